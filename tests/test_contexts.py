"""What the student sees each turn, and rows whose masks mark exactly what was chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.settings import context as context_of
from tutelage.scheduler.chat import Chat
from tutelage.scheduler.contexts import Context, Reply
from tutelage.scheduler.episodes import NO_ACTION, Row

TASK = "Your task is to: put a mug on the desk."
SEEN = [f"You are in a kitchen.\n\n{TASK}", "You see a mug 1.", "Nothing happens.", "Done."]
SAID = ["look", "take mug 1", "go to desk 1"]
INFO = {"task": TASK, "admissible_actions": ["look", "take mug 1"]}


@pytest.fixture
def chat(tokenizer: Any) -> Chat:
    return Chat(tokenizer)


def _reply(chat: Chat, text: str, turn: int, *, closed: bool = True) -> Reply:
    """Log-probabilities that name their turn and place: -turn.place; the law's are half of them."""
    ids = chat.reply(text) if closed else chat.reply(text)[:-1]
    said = [-turn - 0.01 * i for i in range(len(ids))]
    return Reply(ids=ids, logprobs=said, closed=closed, sampling_logprobs=[0.5 * x for x in said])


def _play(
    chat: Chat, *, experts: list[str] | None = None, **settings: Any
) -> tuple[list[str], tuple[Row, ...]]:
    """Three turns and a last observation that nobody answers: (prompts as text, rows)."""
    context = Context(chat, context_of(**settings))
    prompts = []
    for turn, (seen, said) in enumerate(zip(SEEN[:3], SAID, strict=True)):
        context.observe(seen, INFO)
        prompts.append(chat.tokenizer.decode(context.prompt_ids))
        context.reply(
            _reply(chat, said, turn),
            action=said,
            expert_ids=None if experts is None else chat.reply(experts[turn]),
        )
    context.observe(SEEN[3], INFO)
    return prompts, context.rows()


def _chosen(chat: Chat, row: Row) -> dict[int, str]:
    """By turn: the text of the tokens that it chose."""
    return {
        int(turn): chat.tokenizer.decode(row.ids_T[row.turns_T == turn].tolist())
        for turn in np.unique(row.turns_T)
        if turn != NO_ACTION
    }


class TestFull:
    def test_each_prompt_extends_the_last_with_reply_and_observation(self, chat: Chat) -> None:
        prompts, _ = _play(chat)
        assert prompts == [
            f"<|user|>{SEEN[0]}<|assistant|>",
            f"<|user|>{SEEN[0]}<|assistant|>look<|end|><|user|>{SEEN[1]}<|assistant|>",
            f"<|user|>{SEEN[0]}<|assistant|>look<|end|><|user|>{SEEN[1]}<|assistant|>"
            f"take mug 1<|end|><|user|>{SEEN[2]}<|assistant|>",
        ]

    def test_one_row_marks_every_reply_and_nothing_else(self, chat: Chat) -> None:
        """The end-of-turn token that the student sampled is its own; the unanswered last
        observation is not in the row."""
        _, (row,) = _play(chat)
        assert _chosen(chat, row) == {i: f"{said}<|end|>" for i, said in enumerate(SAID)}
        assert chat.tokenizer.decode(row.ids_T.tolist()).endswith("go to desk 1<|end|>")
        assert row.action_mask_T[-1]
        for turn, said in enumerate(SAID):
            expected = _reply(chat, said, turn).logprobs
            assert row.behavior_logprobs_T[row.turns_T == turn].tolist() == pytest.approx(expected)
        assert np.isnan(row.behavior_logprobs_T[~row.action_mask_T]).all()
        np.testing.assert_array_equal(row.sampling_T, 0.5 * row.behavior_logprobs_T)
        assert not row.branches_T.any()

    def test_a_reply_cut_off_is_closed_by_a_token_that_nobody_chose(self, chat: Chat) -> None:
        context = Context(chat, context_of())
        context.observe("one", {})
        context.reply(_reply(chat, "go to", 0, closed=False), action="go to")
        context.observe("two", {})
        context.reply(_reply(chat, "look", 1), action="look")
        (row,) = context.rows()
        assert _chosen(chat, row) == {0: "go to", 1: "look<|end|>"}
        text = chat.tokenizer.decode(row.ids_T.tolist())
        assert text == "<|user|>one<|assistant|>go to<|end|><|user|>two<|assistant|>look<|end|>"

    def test_the_task_is_repeated_after_the_first_observation(self, chat: Chat) -> None:
        prompts, _ = _play(chat, repeat_task=True)
        assert prompts[0] == f"<|user|>{SEEN[0]}<|assistant|>"
        assert prompts[1].endswith(f"<|user|>{SEEN[1]}\n{TASK}<|assistant|>")
        assert prompts[2].endswith(f"<|user|>{SEEN[2]}\n{TASK}<|assistant|>")

    def test_admissible_actions_are_listed_on_request(self, chat: Chat) -> None:
        listed = "\nAdmissible actions: look, take mug 1<|assistant|>"
        prompts, _ = _play(chat, admissible=True)
        assert all(prompt.endswith(listed) for prompt in prompts)
        with pytest.raises(ValueError, match=r"rollout\.context\.admissible.*admissible_actions"):
            Context(chat, context_of(admissible=True)).observe("x", {})

    def test_nothing_chosen_gives_no_row(self, chat: Chat) -> None:
        context = Context(chat, context_of())
        context.observe("one", {})
        assert context.rows() == ()

    def test_prompts_extend_each_other_as_ids(self, chat: Chat) -> None:
        """What lets an engine keep its cache: not equal text but equal ids, prompt after reply."""
        context = Context(chat, context_of())
        assert context.appends
        trunk: list[int] = []
        for turn, (seen, said) in enumerate(zip(SEEN[:3], SAID, strict=True)):
            context.observe(seen, INFO)
            assert list(context.prompt_ids[: len(trunk)]) == trunk
            reply = _reply(chat, said, turn)
            trunk = [*context.prompt_ids, *reply.ids]
            context.reply(reply, action=said)


class TestWindow:
    def test_a_prompt_holds_the_task_the_last_turns_and_the_observation(self, chat: Chat) -> None:
        prompts, _ = _play(chat, kind="window", turns=1)
        assert prompts == [
            f"<|user|>{SEEN[0]}<|assistant|>",
            f"<|user|>{TASK}\n{SEEN[0]}\n> look\n{SEEN[1]}<|assistant|>",
            f"<|user|>{TASK}\n{SEEN[1]}\n> take mug 1\n{SEEN[2]}<|assistant|>",
        ]

    def test_no_history_and_admissible_actions(self, chat: Chat) -> None:
        prompts, _ = _play(chat, kind="window", turns=0, admissible=True)
        listed = "Admissible actions: look, take mug 1"
        assert prompts[2] == f"<|user|>{TASK}\n{SEEN[2]}\n{listed}<|assistant|>"

    def test_an_environment_that_names_no_task_has_its_first_observation_repeated(
        self, chat: Chat
    ) -> None:
        context = Context(chat, context_of(kind="window", turns=0))
        context.observe("count to three", {})
        context.reply(_reply(chat, "1", 0), action="1")
        context.observe("go on", {})
        assert chat.tokenizer.decode(context.prompt_ids) == (
            "<|user|>count to three\ngo on<|assistant|>"
        )

    def test_a_row_a_turn_marks_its_reply(self, chat: Chat) -> None:
        prompts, rows = _play(chat, kind="window", turns=2)
        assert len(rows) == 3
        for turn, (row, prompt, said) in enumerate(zip(rows, prompts, SAID, strict=True)):
            assert _chosen(chat, row) == {turn: f"{said}<|end|>"}
            assert chat.tokenizer.decode(row.ids_T.tolist()) == f"{prompt}{said}<|end|>"
            assert np.isfinite(row.behavior_logprobs_T[row.action_mask_T]).all()
            np.testing.assert_array_equal(row.sampling_T, 0.5 * row.behavior_logprobs_T)
        assert not Context(chat, context_of(kind="window")).appends


class TestDagger:
    """The student acts, the expert's action in the same state takes the loss."""

    EXPERTS = ("go to fridge 1", "take mug 1", "open fridge 1")

    def test_full_puts_the_experts_words_on_branches(self, chat: Chat) -> None:
        prompts, (row,) = _play(chat, experts=list(self.EXPERTS))
        plain_prompts, (plain,) = _play(chat)
        assert prompts == plain_prompts  # what the student sees is its own history
        assert _chosen(chat, row) == {i: f"{said}<|end|>" for i, said in enumerate(self.EXPERTS)}
        assert np.isnan(row.behavior_logprobs_T).all()  # nobody sampled these
        assert np.isnan(row.sampling_T).all()
        # Each branch has a number of its own, and all that takes loss is on one.
        assert (
            row.branches_T[row.action_mask_T].tolist()
            == (row.turns_T[row.action_mask_T] + 1).tolist()
        )
        assert not row.branches_T[~row.action_mask_T].any()
        trunk = row.ids_T[row.branches_T == 0].tolist()
        assert trunk == plain.ids_T[: len(trunk)].tolist()
        # The row ends with the last branch: the student's last words predict nothing.
        assert len(trunk) == len(plain.ids_T) - len(chat.reply(SAID[2]))

    def test_a_branch_stands_where_the_student_began_its_reply(self, chat: Chat) -> None:
        prompts, (row,) = _play(chat, experts=list(self.EXPERTS))
        for turn, prompt in enumerate(prompts):
            at = int(np.flatnonzero(row.turns_T == turn)[0])
            source = int(row.sources_T()[at])
            trunk = row.ids_T[: source + 1][row.branches_T[: source + 1] == 0]
            assert chat.tokenizer.decode(trunk.tolist()) == prompt
            assert row.positions_T()[at] == len(trunk)

    def test_window_puts_the_experts_words_in_the_students_place(self, chat: Chat) -> None:
        prompts, rows = _play(chat, experts=list(self.EXPERTS), kind="window")
        assert "> look" in prompts[1]  # history tells what was done, not what should have been
        for turn, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            assert _chosen(chat, row) == {turn: f"{self.EXPERTS[turn]}<|end|>"}
            assert chat.tokenizer.decode(row.ids_T.tolist()) == (
                f"{prompt}{self.EXPERTS[turn]}<|end|>"
            )
            assert np.isnan(row.behavior_logprobs_T).all() and not row.branches_T.any()
            assert np.isnan(row.sampling_T).all()


def test_an_unknown_kind_is_refused(chat: Chat) -> None:
    with pytest.raises(ValueError, match=r"'rolling'.*full, window"):
        Context(chat, replace(context_of(), kind="rolling"))


class TestRow:
    def _row(self, **changes: Any) -> Row:
        fields: dict[str, Any] = {
            "ids_T": np.asarray([1, 2, 3], dtype=np.int32),
            "turns_T": np.asarray([-1, 0, 0], dtype=np.int32),
            "behavior_logprobs_T": np.zeros(3, dtype=np.float32),
            "branches_T": np.zeros(3, dtype=np.int32),
        }
        return Row(**(fields | changes))

    def test_fields_of_different_lengths_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"differ in length: \[2, 3\]"):
            self._row(behavior_logprobs_T=np.zeros(2, dtype=np.float32))

    def test_a_row_without_a_prompt_is_refused(self) -> None:
        """Its first token has no hidden state that predicts it."""
        with pytest.raises(ValueError, match="must begin with a prompt"):
            self._row(turns_T=np.asarray([0, 0, 0], dtype=np.int32))

    def test_sources_and_positions_of_branches_by_hand(self) -> None:
        """Trunk a b c d, a branch x y after b, another z after c: each as if it were alone."""
        row = Row(
            ids_T=np.asarray([10, 11, 20, 21, 12, 30, 13], dtype=np.int32),
            turns_T=np.asarray([-1, -1, 0, 0, -1, 1, -1], dtype=np.int32),
            behavior_logprobs_T=np.zeros(7, dtype=np.float32),
            branches_T=np.asarray([0, 0, 1, 1, 0, 2, 0], dtype=np.int32),
        )
        assert row.positions_T().tolist() == [0, 1, 2, 3, 2, 3, 3]
        assert row.sources_T().tolist() == [-1, 0, 1, 2, 1, 4, 4]
