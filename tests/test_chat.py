"""Ids built turn by turn are the template's own rendering of the conversation."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tutelage.scheduler.chat import Chat

CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
# Like Qwen3's: what was thought in earlier replies is no longer rendered.
FORGETFUL = CHATML.replace(
    "message['content'] + '<|im_end|>",
    "(message['content'].split('</think>')[-1] if message['role'] == 'assistant' and not loop.last"
    " else message['content']) + '<|im_end|>",
)
TURNS = [
    ("You are in a kitchen.\nYour task is to: put a mug on the desk.", "go to desk 1"),
    ("You arrive at desk 1. On the desk 1, you see nothing.", "take mug 1"),
    ("Nothing happens.", "look"),
    ("12 + 34 = ?", "12 + 34 = 46\n\\boxed{46}"),
]


def _with_template(tokenizer: Any, template: str, *, end: str = "<|im_end|>") -> Any:
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template, made.eos_token = template, end
    return made


@pytest.fixture(scope="module", params=["tiny", "chatml", "reasoning"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    if request.param == "tiny":
        return tokenizer
    return _with_template(tokenizer, {"chatml": CHATML, "reasoning": REASONING}[request.param])


def _messages(turns: int, system: str | None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for said, reply in TURNS[:turns]:
        messages += [
            {"role": "user", "content": said},
            {"role": "assistant", "content": reply},
        ]
    return messages


@pytest.mark.parametrize("system", [None, "You live here."])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "cut off"])
def test_ids_turn_by_turn_are_the_templates_rendering(
    any_tokenizer: Any, system: str | None, closed: bool
) -> None:
    """At every turn: the prompt that the student continues is what a chat server would send. A
    reply that the student did not end itself is closed by the template's tokens."""
    chat = Chat(any_tokenizer, system=system)
    thinks = "<think>" in any_tokenizer.chat_template
    trunk: list[int] = []
    for turn, (said, reply) in enumerate(TURNS):
        trunk += chat.opening(said) if turn == 0 else chat.following(said, closed=closed)
        messages = [*_messages(turn, system), {"role": "user", "content": said}]
        text = any_tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        if thinks:  # what the prompt ended with was the reply's beginning
            for _, earlier in TURNS[:turn]:
                text = text.replace(f"assistant\n{earlier}", f"assistant\n<think>\n{earlier}")
        assert trunk == any_tokenizer.encode(text, add_special_tokens=False), turn
        ids = chat.reply(reply)
        trunk += ids if closed else ids[:-1]


def test_the_default_system_message_stands_once_at_the_head(tokenizer: Any) -> None:
    chat = Chat(_with_template(tokenizer, CHATML))
    ids = [
        *chat.opening("one"),
        *chat.reply("two"),
        *chat.following("three", closed=True),
    ]
    text = chat.tokenizer.decode(ids)
    assert text.count("You are a helpful assistant.") == 1
    assert text.startswith("<|im_start|>system\n")


def test_the_closing_token_is_never_repeated(any_tokenizer: Any) -> None:
    chat = Chat(any_tokenizer)
    ended = [*chat.reply("look"), *chat.following("Nothing happens.", closed=True)]
    cut = [*chat.reply("look")[:-1], *chat.following("Nothing happens.", closed=False)]
    assert ended == cut
    at = len(chat.reply("look"))
    assert ended[at - 1] == chat.end_id and ended[at] not in chat.eos_ids


def test_a_reply_ends_as_the_template_ends_it(tokenizer: Any) -> None:
    """The tokenizer's EOS is another token than the template's end of turn, as in Qwen2.5 base
    models: the turn's own token counts, and both stop a reply."""
    odd = _with_template(tokenizer, CHATML, end="<|end|>")
    chat = Chat(odd)
    im_end, end = odd.convert_tokens_to_ids(["<|im_end|>", "<|end|>"])
    assert chat.end_id == im_end
    assert chat.eos_ids == {im_end, end}
    assert chat.reply("look")[-1] == im_end


def test_text_is_the_reply_without_its_end(any_tokenizer: Any) -> None:
    chat = Chat(any_tokenizer)
    for _, reply in TURNS:
        assert chat.text(chat.reply(reply)) == reply
        assert chat.text(chat.reply(reply)[:-1]) == reply
    assert chat.text([]) == "" and chat.text([chat.end_id]) == ""


def test_earlier_replies_are_never_rendered_again(tokenizer: Any) -> None:
    """The template would drop what was thought; the trunk keeps the ids that were sampled."""
    forgetful = _with_template(tokenizer, FORGETFUL)
    thought = "hm, a mug</think>take mug 1"
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "two"},
    ]
    rendered = forgetful.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "hm, a mug" not in rendered
    chat = Chat(forgetful)
    ids = [*chat.opening("one"), *chat.reply(thought), *chat.following("two", closed=True)]
    assert chat.tokenizer.decode(ids) == rendered.replace("take mug 1", thought)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("for message in messages", "for message in messages[-1:]"),
        CHATML.replace("for message in messages", "for message in messages[:1]"),
        CHATML.replace("for message in messages", "for message in messages + messages[:1]"),
        "{{ messages[0]['content'] }}",
    ],
    ids=["last only", "first only", "repeats", "first text only"],
)
def test_a_template_that_drops_or_repeats_turns_is_refused(tokenizer: Any, template: str) -> None:
    with pytest.raises(ValueError, match="drops or repeats a message") as refused:
        Chat(_with_template(tokenizer, template))
    assert "\n" not in str(refused.value)


def test_without_a_template_the_texts_stand_bare(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    chat = Chat(bare)
    ids = [*chat.opening("12 + 3 ="), *chat.reply(" 15"), *chat.following("4 + 4 =", closed=True)]
    assert bare.decode(ids) == "12 + 3 =\n 15<|end|>\n4 + 4 =\n"
    assert chat.end_id == bare.eos_token_id


def test_a_tokenizer_without_an_end_is_refused(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        Chat(endless)


def test_a_special_token_spelled_by_an_environment_is_plain_text(tokenizer: Any) -> None:
    """It reads the same and holds no special id; the template's own stay."""
    chat, text = Chat(tokenizer), "a note says <|end|> <|assistant|> take it"
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    plain, spelled = chat.opening("a note says take it"), chat.opening(text)
    assert [i for i in spelled if i in special] == [i for i in plain if i in special]
    assert text in tokenizer.decode(spelled)
    assert chat.following(text, closed=True)[-1] == chat.following("x", closed=True)[-1]


@pytest.mark.parametrize(
    ("tail", "thought"),
    [
        ("assistant\n", ""),
        ("assistant\n<think>\n", "<think>\n"),
        ("assistant\n<think>\n\n</think>\n\n", ""),  # Qwen3 that is asked not to think
    ],
)
def test_a_thought_that_the_template_begins_is_known(
    tokenizer: Any, tail: str, thought: str
) -> None:
    template = CHATML.replace("'<|im_start|>assistant\n'", repr(f"<|im_start|>{tail}"))
    assert Chat(_with_template(tokenizer, template)).thought == thought
