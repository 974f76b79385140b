"""The GiGPO teacher's prompt to the character, its replies as its authors read them, and one exact
row a turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tutelage.envs  # noqa: F401 (registers the household)
from tests.settings import context as context_of
from tests.settings import rollout
from tutelage.distill.config.faults import ConfigError
from tutelage.distill.config.loading import parse_config
from tutelage.scheduler.chat import Chat
from tutelage.scheduler.contexts import Context, Reply
from tutelage.scheduler.engine import Completion, Request
from tutelage.scheduler.episodes import NO_ACTION, Episode, Order
from tutelage.scheduler.formats import GIGPO, find_format
from tutelage.scheduler.rollouts import RolloutWorker

# verl-agent, agent_system/environments/prompts/alfworld.py, character for character: a line break
# before and after, and a space at the end of the line that names the think tags.
NO_HISTORY = (
    "\n"
    "You are an expert agent operating in the ALFRED Embodied Environment.\n"
    "Your current observation is: {current_observation}\n"
    "Your admissible actions of the current situation are: [{admissible_actions}].\n"
    "\n"
    "Now it's your turn to take an action.\n"
    "You should first reason step-by-step about the current situation. This reasoning process MUST"
    " be enclosed within <think> </think> tags. \n"
    "Once you've finished your reasoning, you should choose an admissible action for current step"
    " and present it within <action> </action> tags.\n"
)
WITH_HISTORY = (
    "\n"
    "You are an expert agent operating in the ALFRED Embodied Environment. Your task is to:"
    " {task_description}\n"
    "Prior to this step, you have already taken {step_count} step(s). Below are the most recent"
    " {history_length} observations and the corresponding actions you took: {action_history}\n"
    "You are now at step {current_step} and your current observation is: {current_observation}\n"
    "Your admissible actions of the current situation are: [{admissible_actions}].\n"
    "\n"
    "Now it's your turn to take an action.\n"
    "You should first reason step-by-step about the current situation. This reasoning process MUST"
    " be enclosed within <think> </think> tags. \n"
    "Once you've finished your reasoning, you should choose an admissible action for current step"
    " and present it within <action> </action> tags.\n"
)

ROOM = "-= Welcome to TextWorld, ALFRED! =-\n\nYou see a bed 1.\n\nYour task is to: examine a mug."
TASK = "Your task is to: examine a mug."
ACTIONS = ["go to bed 1", "help", "look"]
LISTED = "'go to bed 1'\n 'look'"
PAST = [(ROOM, "look"), ("You are facing the bed 1.", "go to bed 1"), ("You {see} a mug 1.", "")]


def _ask(turns_so_far: int, *, turns: int = 2, task: str = TASK) -> str:
    return GIGPO.ask(
        task=task,
        history=PAST[:turns_so_far],
        turns=turns,
        observation="Nothing happens.",
        actions=ACTIONS,
    )


def test_the_first_prompt_is_the_authors_without_help_and_history() -> None:
    assert _ask(0) == NO_HISTORY.format(
        current_observation="Nothing happens.", admissible_actions=LISTED
    )


@pytest.mark.parametrize(
    ("turns_so_far", "shown", "history"),
    [
        (1, 1, f"[Observation 1: '{ROOM}', Action 1: 'look']"),
        (
            3,
            2,
            "[Observation 2: 'You are facing the bed 1.', Action 2: 'go to bed 1']\n"
            "[Observation 3: 'You {see} a mug 1.', Action 3: '']",
        ),
    ],
)
def test_later_prompts_count_the_steps_and_show_the_last_turns(
    turns_so_far: int, shown: int, history: str
) -> None:
    assert _ask(turns_so_far) == WITH_HISTORY.format(
        task_description="examine a mug.",
        step_count=turns_so_far,
        history_length=shown,
        action_history=history,
        current_step=turns_so_far + 1,
        current_observation="Nothing happens.",
        admissible_actions=LISTED,
    )


def test_a_task_is_found_in_a_whole_observation_or_taken_as_it_is() -> None:
    assert _ask(1, task=ROOM) == _ask(1)
    assert "Your task is to: count to 3\n" in _ask(1, task="count to 3")


@pytest.mark.parametrize(
    ("reply", "command", "remembered", "valid"),
    [
        ("<think>so</think><action>go to bed 1</action>", "go to bed 1", "go to bed 1", True),
        ("<think>\n</think>\n<ACTION> Go To Bed 1\n</action>", "go to bed 1", "go to bed 1", True),
        # The first of each tag: a second action is not read.
        ("<think></think><action>look</action><action>help</action>", "look", "look", True),
        # No thought, or a Chinese one: invalid, and carried out.
        ("<action>look</action>", "look", "look", False),
        ("<THINK>so</THINK><action>look</action>", "look", "look", False),
        ("<think>好</think><action>look</action>", "look", "look", False),
        # Without both tags nothing is carried out; prompts remember the last 30 characters.
        ("look", "", "look", False),
        ("Well, I shall Look around in the kitchen", "", "all look around in the kitchen", False),
        ("<think>so</think><action>look", "", "<think>so</think><action>look", False),
        ("look</action>", "", "look</action>", False),
        ("", "", "", False),
        # The tags the wrong way round hold nothing.
        ("</action><think></think><action>look", "", "", True),
    ],
)  # fmt: skip
def test_replies_are_read_as_the_authors_read_them(
    reply: str, command: str, remembered: str, valid: bool
) -> None:
    said = GIGPO.read(reply)
    assert (said.command, said.remembered, said.valid) == (command, remembered, valid)


class TestContext:
    REPLIES = ("<think>a mug?</think><action>Look</action>", "no tags", "<action>help</action>")

    @pytest.fixture
    def chat(self, tokenizer: Any) -> Chat:
        return Chat(tokenizer)

    def test_a_row_a_turn_holds_the_asked_prompt_and_the_whole_reply(self, chat: Chat) -> None:
        """The sampled ids stay as they are: what is read out of them changes no token."""
        context = Context(chat, context_of(kind="window", turns=2, format="gigpo"))
        assert not context.appends
        asked, history = [], []
        for turn, (seen, text) in enumerate(zip([ROOM, "one", "two"], self.REPLIES, strict=True)):
            context.observe(seen, {"task": TASK, "admissible_actions": ACTIONS})
            prompt = GIGPO.ask(
                task=TASK, history=history, turns=2, observation=seen, actions=ACTIONS
            )
            assert context.prompt_ids == chat.opening(prompt)
            asked.append(context.prompt_ids)
            # ids that no tokenizer would make of the text: one by one
            ids = [i for letter in text for i in chat.reply(letter)[:-1]] + [chat.end_id]
            logprobs = [-turn - 0.01 * i for i in range(len(ids))]
            remembered = context.read(chat.text(ids)).remembered
            context.reply(Reply(ids=ids, logprobs=logprobs, closed=True), action=remembered)
            history.append((seen, remembered))
            row = context.rows()[turn]
            assert row.ids_T.tolist() == asked[turn] + ids
            assert row.behavior_logprobs_T[row.action_mask_T].tolist() == pytest.approx(logprobs)
            assert row.turns_T.tolist() == [NO_ACTION] * len(asked[turn]) + [turn] * len(ids)
        assert [action for _, action in history] == ["look", "no tags", "help"]
        assert len(context.rows()) == 3

    def test_other_contexts_take_a_reply_as_it_stands(self, chat: Chat) -> None:
        for kind in ("full", "window"):
            context = Context(chat, context_of(kind=kind))
            said = context.read(self.REPLIES[0])
            assert said.command == said.remembered == self.REPLIES[0] and said.valid
            assert context.say("look") == "look"

    def test_an_environment_without_admissible_actions_is_named(self, chat: Chat) -> None:
        context = Context(chat, context_of(kind="window", format="gigpo"))
        with pytest.raises(ValueError, match=r"rollout\.context\.format.*admissible_actions"):
            context.observe("x", {})


class SpeakingEngine:
    """Says what `say` makes of the prompt."""

    max_context, lockstep, version = 10_000, True, 0

    def __init__(self, tokenizer: Any, say: Callable[[str], str]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self.requests: list[Request] = []
        self._queue: list[Request] = []

    def load(self, weights: Any, version: int) -> None:
        raise AssertionError("nobody learns here")

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        self._queue.append(request)

    def step(self) -> list[Completion]:
        taken, self._queue = self._queue, []
        return [self._answer(request) for request in taken]

    def _answer(self, request: Request) -> Completion:
        text = self._say(self._tokenizer.decode(request.ids))
        ids = [*self._tokenizer.encode(text, add_special_tokens=False), *request.stop_ids]
        return Completion(
            session=request.session, ids=ids, logprobs=[-0.5] * len(ids), stopped=True
        )

    def release(self, session: int) -> None:
        pass

    @property
    def pending(self) -> int:
        return len(self._queue)


def _household(tokenizer: Any, say: Any, **changes: Any) -> tuple[Episode, SpeakingEngine]:
    engine = SpeakingEngine(tokenizer, say)
    how = rollout(
        "tutelage/Household-v0",
        {"split": "train", "expert": True},
        context={"kind": "window", "turns": 2, "format": "gigpo"},
        max_turns=changes.pop("max_turns", 50),
        max_new_tokens=200,
        processes=0,
    )
    worker = RolloutWorker(engine, tokenizer, {"home": how})
    order = Order(task="home", number=0, seed=0, index=0, **changes)
    (episode,) = worker.collect([order])
    worker.close()
    assert isinstance(episode, Episode)
    return episode, engine


class TestEpisodes:
    def test_the_extracted_command_is_played_and_the_whole_reply_is_trained(
        self, tokenizer: Any
    ) -> None:
        """A policy that thinks and then says the expert's command wins as the expert does."""
        expert, _ = _household(tokenizer, lambda prompt: "", actor="expert")
        commands = iter([turn.action for turn in expert.turns])
        texts: list[str] = []

        def say(prompt: str) -> str:
            texts.append(f"<think>i look</think><action>{next(commands)}</action>")
            return texts[-1]

        episode, engine = _household(tokenizer, say)
        assert episode.success and expert.success
        assert [turn.action for turn in episode.turns] == texts
        assert all(turn.valid for turn in episode.turns)
        assert len(episode.rows) == len(engine.requests) == len(texts)
        for row, request, text in zip(episode.rows, engine.requests, texts, strict=True):
            at = len(request.ids)
            assert row.ids_T[:at].tolist() == list(request.ids)
            assert tokenizer.decode(row.ids_T[row.action_mask_T].tolist()) == text + "<|end|>"
        assert "have already taken 3 step(s)" in tokenizer.decode(engine.requests[3].ids)

    def test_replies_without_tags_change_nothing_and_are_counted(self, tokenizer: Any) -> None:
        """Not even one that would be a command: the household has not moved."""
        for text in ("look", "i go to the fridge 1 and then on", ""):
            episode, _ = _household(tokenizer, lambda prompt, text=text: text, max_turns=3)
            seen = [turn.observation for turn in episode.turns][1:]
            assert [*seen, episode.final_observation] == ["Nothing happens."] * 3
            assert not any(turn.valid for turn in episode.turns)
            assert len(episode.rows) == 3

    def test_an_experts_rows_put_its_command_between_the_tags(self, tokenizer: Any) -> None:
        episode, _ = _household(tokenizer, lambda prompt: "", actor="expert")
        for row, turn in zip(episode.rows, episode.turns, strict=True):
            said = tokenizer.decode(row.ids_T[row.action_mask_T].tolist())
            assert said == f"<action>{turn.action}</action><|end|>"
            assert np.isnan(row.behavior_logprobs_T).all()

    def test_labels_put_the_experts_command_between_the_tags(self, tokenizer: Any) -> None:
        episode, _ = _household(tokenizer, lambda prompt: "look", labels=True, max_turns=2)
        said = tokenizer.decode(episode.rows[1].ids_T[episode.rows[1].action_mask_T].tolist())
        assert said == f"<action>{episode.turns[1].expert_action}</action><|end|>"


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"kind": "window", "format": "gipgo"}, "did you mean 'gigpo'"),
        ({"kind": "full", "format": "gigpo"}, "kind: window and turns: 1 or more"),
        ({"kind": "window", "turns": 0, "format": "gigpo"}, "kind: window and turns: 1 or more"),
    ],
)
def test_a_format_that_cannot_be_is_refused_in_the_config(context: Any, message: str) -> None:
    data = {
        "run": "x",
        "steps": 1,
        "student": {"model": "org/student"},
        "teachers": {"t": {"model": "org/teacher"}},
        "tasks": {"home": {"env": "x:Y-v0", "teacher": "t", "rollout": {"context": context}}},
    }
    with pytest.raises(ConfigError, match=message):
        parse_config(data, "test")
    assert find_format("gigpo") is GIGPO
