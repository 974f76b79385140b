"""Checks tokenizers: their vocabularies, ends of turns, chat templates and masked tokens."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from itertools import pairwise, zip_longest
from typing import Any

from tutelage.distill.doctor.findings import Check, Finding
from tutelage.distill.student.masks import special_ids
from tutelage.envs.errors import one_line
from tutelage.scheduler.chat import Chat
from tutelage.scheduler.templates import conversation, reads_clock, render, spoken_of


def check_vocabulary(subject: str, student: Any, teacher: Any) -> Finding:
    """Whether every token has the same id for both: scores belong to ids, not to texts."""
    check = Check(subject, "vocabulary")
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return check.ok(f"{len(student):,} ids, equal to the student's one by one")
    other = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
    first = other[0]
    return check.fault(
        f"{len(other):,} tokens have another id than the student's {len(ours):,}, such as"
        f" {first!r}: {_id(theirs.get(first))}, the student's {_id(ours.get(first))}",
        "take a teacher with the student's tokenizer (same family, same version), or remove what"
        " was added to one of the two",
    )


def _id(number: int | None) -> str:
    return "none" if number is None else str(number)


def check_ends(subject: str, student: Chat, teacher: Chat) -> Finding:
    """Whether the teacher ends a reply as the student does. Else it finds the student's end token
    unlikely everywhere, and the student unlearns to stop."""
    check = Check(subject, "EOS")
    ours, theirs = student.tokenizer, teacher.tokenizer
    if theirs.eos_token_id != ours.eos_token_id:
        return check.fault(
            f"it ends with {theirs.eos_token!r} ({_id(theirs.eos_token_id)}), the student with"
            f" {ours.eos_token!r} ({_id(ours.eos_token_id)})",
            "set eos_token in the tokenizer_config.json of the one that is wrong; a base model and"
            " its instruct version often differ here",
        )
    if student.end_id not in teacher.eos_ids:
        return check.fault(
            f"the student's replies end with {_tokens(ours, [student.end_id])}, the teacher's with"
            f" {_tokens(theirs, teacher.eos_ids)}",
            "choose a teacher that was taught in the student's chat template, or put the token into"
            " eos_token_id of its generation_config.json",
        )
    if teacher.eos_ids != student.eos_ids:
        return check.note(
            f"the student's replies may end with {_tokens(ours, student.eos_ids)}, the teacher's"
            f" with {_tokens(theirs, teacher.eos_ids)}",
            "an end that one of the two does not know is seldom taught: make eos_token_id of both"
            " generation_config.json the same",
        )
    return check.ok(f"{theirs.eos_token!r}, id {theirs.eos_token_id}, as the student's")


def _tokens(tokenizer: Any, ids: Collection[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in sorted(ids))


def check_end_of_turn(
    subject: str, tokenizer: Any, told: Collection[int] = (), date: datetime.date | None = None
) -> Finding:
    """Whether a reply can end: there is an EOS token, and the template closes a reply with it.

    told: the ids that end a reply by the model's own generation settings.
    """
    check = Check(subject, "end of turn")
    try:
        chat = Chat(tokenizer, stop_ids=told, date=date)
    except ValueError as error:
        return check.fault(
            one_line(error), "correct the files of the tokenizer, as the message says"
        )
    end = chat.end_id
    said = f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})"
    # not closed: what follows then begins with the template's own closing token
    closing = chat.following("x", closed=False)[:1]
    if tokenizer.chat_template and closing != [end]:
        token = tokenizer.convert_ids_to_tokens(closing)
        return check.note(
            f"the chat template closes a reply with {token}, which ends no turn; replies end with"
            f" {said}",
            "set eos_token to the template's closing token, if that is what the model was taught",
        )
    if strange := sorted({*told} - chat.eos_ids):
        words = tokenizer.convert_ids_to_tokens([i for i in strange if i < len(tokenizer)])
        return check.note(
            f"replies end with {said}; the model's own settings also say {strange} {words}, which"
            " is no special token of this tokenizer: not taken",
            "correct eos_token_id in its generation_config.json or config.json",
        )
    others = chat.eos_ids - {end}
    more = f", or with {_tokens(tokenizer, others)}" if others else ""
    return check.ok(f"replies end with {said}{more}")


def check_padding(subject: str, rows: int, size: int) -> Finding:
    """Whether every id of the tokenizer has a row in the embedding."""
    check = Check(subject, "embedding rows")
    if rows == size:
        return check.ok(f"{rows:,}, one an id")
    if rows > size:
        return check.note(
            f"{rows:,} rows for {size:,} ids: {rows - size:,} are padding, cut off before the"
            " softmax: they get no probability"
        )
    return check.fault(
        f"{rows:,} rows for {size:,} ids: the last {size - rows:,} tokens have no row",
        "tokenizer and model belong to different models, or tokens were added without resizing",
    )


def check_template(
    subject: str, tokenizer: Any, system: str | None = None, date: datetime.date | None = None
) -> Finding:
    """Whether the chat template shows every turn, and leaves earlier ones unchanged.

    Rollouts append ids and never render a conversation again. So a template that rewrites earlier
    turns does no harm; under one that drops them the model was never trained on conversations with
    earlier turns.
    """
    check = Check(subject, "chat template" + ("" if system is None else ", system"))
    if not tokenizer.chat_template:
        return check.note(
            "none: texts are joined bare, with a newline between turns",
            "give an instruct model the chat_template that it was trained with",
        )
    try:
        plain = _renderings(tokenizer, system, "{}", date)
        thinking = _renderings(tokenizer, system, "<think>thought of {}</think>{}", date)
    except Exception as error:  # a template is a program: it may raise anything
        plain, thinking, said = [], [], one_line(error)
    # before Chat, which would refuse such a template with a less telling message
    if plain and (gone := [text for text in (*USERS, *REPLIES) if text not in plain[-1]]):
        return check.fault(
            f"it drops earlier turns: of three, {', '.join(map(repr, gone))} no longer show",
            "take a template that shows every turn, or prompt each turn afresh: rollout.context:"
            " {kind: window}",
        )
    try:
        chat = Chat(tokenizer, system=system, date=date)
    except ValueError as error:
        return check.fault(one_line(error), "see the message")
    if not plain:
        return check.fault(
            f"it fails on a conversation of three turns: {said}",
            "give the tokenizer a template that takes user and assistant turns in alternation",
        )
    if chat.pieces.unasked:
        return check.note(
            f"it ignores add_generation_prompt; what opens a reply, {chat.pieces.unasked!r}, is"
            " taken from its finished replies"
        )
    changes = [] if _extends(plain) else ["rewrites earlier turns"]
    if any(f"thought of {text}" not in thinking[-1] for text in REPLIES):
        changes.append("drops the reasoning (<think>) of earlier turns")
    if changes:
        return check.note(
            f"it {' and '.join(changes)}; here they stay as sampled, since ids are appended"
        )
    if (at := _first_difference(tokenizer, chat, plain[-1])) is not None:
        return check.note(
            f"it keeps what was said, but its text in one piece has other ids than turn by turn,"
            f" from token {at} on"
        )
    text = "keeps earlier turns as they were; appended ids are those of its own text"
    if date is not None and reads_clock(tokenizer):
        text += f"; the day that it shows is {date.isoformat()} in all of this run"
    return check.ok(text)


USERS = ("first asked", "second asked", "third asked")
REPLIES = ("first said", "second said")


def _renderings(
    tokenizer: Any, system: str | None, reply: str, date: datetime.date | None
) -> list[str]:
    """A conversation of three user turns, rendered after each of them."""
    spoken = spoken_of(tokenizer, date)
    replies = [reply.format(said, said) for said in REPLIES]
    texts = [USERS[0], replies[0], USERS[1], replies[1], USERS[2]]
    return [
        render(tokenizer, conversation(texts[:n], system=system, spoken=spoken), date=date)
        for n in (1, 3, 5)
    ]


def _extends(texts: Sequence[str]) -> bool:
    """Whether each text begins with the one before."""
    return all(later.startswith(earlier) for earlier, later in pairwise(texts))


def _first_difference(tokenizer: Any, chat: Chat, rendered: str) -> int | None:
    """The place of the first id that differs between the conversation's ids appended turn by turn
    and those of its whole text; None: all are the same."""
    appended = chat.opening(USERS[0])
    for said, user in zip(REPLIES, USERS[1:], strict=True):
        appended += [*chat.reply(said), *chat.following(user, closed=True)]
    # the template has already written the special tokens that a conversation has
    whole = tokenizer.encode(rendered, add_special_tokens=False)
    for at, (ours, theirs) in enumerate(zip_longest(appended, whole)):
        if ours != theirs:
            return at
    return None


def check_same_template(subject: str, student: Any, teacher: Any) -> Finding:
    """Whether the teacher has the student's template, in which it will read every episode."""
    check = Check(subject, "its own template")
    if (student.chat_template or "") == (teacher.chat_template or ""):
        return check.ok("the student's")
    return check.note(
        "differs from the student's, in which it will read every episode",
        "if the teacher was trained under its own, give the student that chat_template",
    )


def check_mask(subject: str, tokenizer: Any, texts: Sequence[str]) -> Finding:
    """Tells which ids `objective.mask_tokens` leaves out of the loss."""
    check = Check(subject, "masked tokens")
    if not texts:
        return check.ok("none: every token of a reply takes loss")
    try:
        found = {text: special_ids(tokenizer, [text]) for text in texts}
    except ValueError as error:
        return check.fault(str(error), "remove it from objective.mask_tokens")
    shown = "; ".join(
        f"{text!r}: " + ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ids)
        for text, ids in found.items()
    )
    if tokenizer.eos_token_id in {i for ids in found.values() for i in ids}:
        return check.note(
            f"{shown}: EOS is among them",
            "the student then never learns from the teacher when to stop: mask EOS only if replies"
            " end otherwise",
        )
    if several := [text for text, ids in found.items() if len(ids) > 1]:
        return check.note(
            f"{shown}: {several[0]!r} is {len(found[several[0]])} ids, each masked where a turn"
            " first has it, whatever it means there",
            "mask texts that are one token",
        )
    return check.ok(f"{shown}, each where a turn first has it")
