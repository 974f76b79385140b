"""Episodes from a scripted engine and small environments: limits, faults, experts, order."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from tests.settings import rollout
from tutelage.scheduler.engine import Completion, Request
from tutelage.scheduler.episodes import GREEDY, Dropped, Episode, Order, SamplingParams
from tutelage.scheduler.rollouts import RolloutWorker, _Play

Say = Callable[[str], str]


class Scripted(gym.Env[str, str]):
    """Counts down from its index: `count` steps, then success if every action was its expert's.

    `faults[index]`: how many more times that game fails, and where ("reset" or a step's number).
    """

    observation_space = action_space = spaces.Text(1000)
    faults: ClassVar[dict[int, list[str | int]]] = {}
    seeds: ClassVar[list[tuple[int, int]]] = []

    def __init__(
        self, expert: bool = True, says_success: bool = True, length: int = 0, bonus: float = 0.0
    ) -> None:
        self.num_episodes = 9
        self._expert, self._says, self._length = expert, says_success, length
        self._bonus = bonus

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._index, self._at, self._right = int(options["index"]), 0, True
        assert seed is not None
        self.seeds.append((self._index, seed))
        self._fail("reset")
        return f"count from {self._index}", self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._at += 1
        self._fail(self._at)
        self._right &= action == str(self._index - self._at + 1)
        ended, cut = self._at == self._index, self._at == self._length
        reward = float(ended and self._right) + self._bonus
        return f"after {self._at} {'x ' * (action == 'long')}", reward, ended, cut, self._info()

    def _fail(self, at: str | int) -> None:
        if at in self.faults.get(self._index, [])[:1]:
            self.faults[self._index].pop(0)
            raise RuntimeError("the kitchen is on fire")

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {"task_type": "even" if self._index % 2 == 0 else "odd"}
        if self._expert:
            info["expert_action"] = str(self._index - self._at)
        if self._says:
            info["success"] = self._at == self._index and self._right
        return info


gym.register("Scripted-v0", entry_point=Scripted)  # type: ignore[arg-type]


class FakeEngine:
    """Says what `say` makes of the prompt's text. patient=False: one completion a step, the last
    submitted first, as a continuous engine might."""

    def __init__(
        self, tokenizer: Any, say: Say, *, max_context: int = 10_000, lockstep: bool = True
    ):
        self._tokenizer, self._say = tokenizer, say
        self.max_context, self.lockstep, self.version = max_context, lockstep, 7
        self.requests: list[Request] = []
        self.released: list[int] = []
        self._queue: list[Request] = []
        self._held: dict[int, list[int]] = {}  # what each session must extend

    def load(self, weights: Any, version: int) -> None:
        self.version = version

    def submit(self, request: Request) -> None:
        assert len(request.ids) + request.max_new_tokens <= self.max_context
        assert all(request.session != other.session for other in self._queue)
        held = self._held.get(request.session, [])
        assert list(request.ids[: len(held)]) == held
        self.requests.append(request)
        self._queue.append(request)

    def step(self) -> list[Completion]:
        taken = self._queue if self.lockstep else self._queue[-1:]
        self._queue = [] if self.lockstep else self._queue[:-1]
        return [self._answer(request) for request in taken]

    def _answer(self, request: Request) -> Completion:
        text = self._say(self._tokenizer.decode(request.ids))
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        ids = [*ids, self._tokenizer.eos_token_id][: request.max_new_tokens]
        self._held[request.session] = [*request.ids, *ids[:-1]]
        return Completion(
            session=request.session,
            ids=ids,
            logprobs=[-0.5] * len(ids),
            stopped=ids[-1] in request.stop_ids,
            sampling_logprobs=[-0.25] * len(ids),
        )

    def release(self, session: int) -> None:
        self.released.append(session)
        self._held.pop(session, None)
        self._queue = [request for request in self._queue if request.session != session]

    @property
    def pending(self) -> int:
        return len(self._queue)


def _countdown(prompt: str) -> str:
    """The right policy: reads where to count from and how far it is."""
    start = int(prompt.split("count from ")[1].split("<")[0])
    return str(start - prompt.count("after "))


def _wrong(prompt: str) -> str:
    return "look"


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Scripted.faults.clear()
    Scripted.seeds.clear()


@pytest.fixture
def make_worker(tokenizer: Any) -> Iterator[Callable[..., RolloutWorker]]:
    made: list[RolloutWorker] = []

    def make(say: Say = _countdown, *, engine: dict[str, Any] | None = None, **how: Any) -> Any:
        settings: dict[str, Any] = {"env": "Scripted-v0", "processes": 0}
        worker = RolloutWorker(
            FakeEngine(tokenizer, say, **(engine or {})),
            tokenizer,
            {"t": rollout(**settings | how)},
        )
        made.append(worker)
        return worker

    yield make
    for worker in made:
        worker.close()


def _orders(*indexes: int, **fields: Any) -> list[Order]:
    return [
        Order(task="t", number=number, seed=100 + number, index=index, **fields)
        for number, index in enumerate(indexes)
    ]


def _episodes(outcomes: Sequence[Episode | Dropped]) -> list[Episode]:
    assert all(isinstance(outcome, Episode) for outcome in outcomes), outcomes
    return list(outcomes)  # type: ignore[arg-type]


def _chosen_text(tokenizer: Any, episode: Episode) -> list[str]:
    (row,) = episode.rows
    return [
        tokenizer.decode(row.ids_T[row.turns_T == turn].tolist())
        for turn in range(len(episode.turns))
    ]


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize("max_live", [2, 64])
def test_outcomes_stand_in_the_orders_order_whatever_ends_first(
    make_worker: Any, tokenizer: Any, lockstep: bool, max_live: int
) -> None:
    worker = make_worker(max_live=max_live, engine={"lockstep": lockstep})
    indexes = [5, 1, 3, 2, 4, 1, 8]
    episodes = _episodes(worker.collect(_orders(*indexes)))
    assert [e.order.number for e in episodes] == list(range(7))
    for episode, index in zip(episodes, indexes, strict=True):
        assert episode.order.index == index and len(episode.turns) == index
        assert episode.success and episode.reward == 1.0 and episode.ended == "terminated"
        assert episode.task_type == ("even" if index % 2 == 0 else "odd")
        assert [turn.action for turn in episode.turns] == [str(index - i) for i in range(index)]
        assert _chosen_text(tokenizer, episode) == [f"{index - i}<|end|>" for i in range(index)]
        assert (episode.version, episode.attempts) == (7, 1)
        assert episode.final_observation.startswith(f"after {index}")


class _Unruly:
    """A pool whose answers come one at a time, in a random order, as those of several processes."""

    def __init__(self, pool: Any, seed: int) -> None:
        self._pool, self._rng, self._held = pool, np.random.default_rng(seed), list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    @property
    def outstanding(self) -> int:
        return int(self._pool.outstanding) + len(self._held)

    def receive(self, *, block: bool = True) -> list[Any]:
        self._held += self._pool.receive(block=block)
        return [self._held.pop(int(self._rng.integers(len(self._held))))]


class _Owing:
    """A pool that owes one answer, and counts how often it is asked."""

    outstanding, looks = 1, 0

    def receive(self, *, block: bool = True) -> list[Any]:
        self.looks += 1
        return []


def test_a_busy_engine_waits_only_for_environments_that_answer_within_a_step(
    make_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_worker(engine={"lockstep": False})
    monkeypatch.setattr(FakeEngine, "pending", 1)
    play = _Play(worker, "t", GREEDY)
    pool = _Owing()
    play._pool, play._step_seconds = pool, 1.0  # type: ignore[assignment]
    play._answers()
    assert pool.looks > 2  # it was asked just now
    pool.looks = 0
    play._answers()
    assert pool.looks == 1  # it has been owing through a whole step


def test_in_lockstep_it_shows_nowhere_whose_answer_came_first(make_worker: Any) -> None:
    """The engine gets its requests in the same order, so batches, and last bits, are the same."""
    asked = []
    for seed in range(3):
        worker = make_worker(max_live=4)
        worker._pools._pools["t"] = _Unruly(worker._pools["t"], seed)
        _episodes(worker.collect(_orders(3, 1, 4, 2, 5, 1, 2)))
        asked.append([(request.session, list(request.ids)) for request in worker.engine.requests])
    assert asked[0] == asked[1] == asked[2]


def test_no_more_episodes_are_live_than_allowed(make_worker: Any) -> None:
    worker = make_worker(max_live=3)
    most = 0
    submit = worker.engine.submit

    def counting(request: Request) -> None:
        nonlocal most
        submit(request)
        most = max(most, worker.engine.pending)

    worker.engine.submit = counting
    _episodes(worker.collect(_orders(*[2] * 10)))
    assert most == 3


def test_each_game_gets_its_index_and_its_seed(make_worker: Any) -> None:
    _episodes(make_worker().collect(_orders(4, 2, 2)))
    assert sorted(Scripted.seeds) == [(2, 101), (2, 102), (4, 100)]


def test_every_turn_of_every_episode_has_randomness_of_its_own(make_worker: Any) -> None:
    """And the same orders give the same seeds again, in another worker too."""
    seeds = []
    for _ in range(2):
        worker = make_worker(_wrong)
        _episodes(worker.collect(_orders(3, 4, 5)))
        seeds.append([request.seed for request in worker.engine.requests])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3 + 4 + 5


class TestLimits:
    def test_max_turns(self, make_worker: Any) -> None:
        (short, cut) = _episodes(make_worker(max_turns=3).collect(_orders(3, 4)))
        assert (short.ended, short.success, len(short.turns)) == ("terminated", True, 3)
        assert (cut.ended, cut.success, len(cut.turns)) == ("max_turns", False, 3)
        assert cut.final_observation.startswith("after 3")

    def test_the_environments_own_limit(self, make_worker: Any) -> None:
        (episode,) = _episodes(make_worker(env_args={"length": 2}).collect(_orders(5)))
        assert (episode.ended, episode.success, len(episode.turns)) == ("truncated", False, 2)

    def test_a_reply_cut_off_is_marked_and_still_acted_on(
        self, make_worker: Any, tokenizer: Any
    ) -> None:
        worker = make_worker(lambda prompt: "1 2 3 4 5 6", max_new_tokens=3)
        (episode,) = _episodes(worker.collect(_orders(1)))
        (turn,) = episode.turns
        assert not turn.complete
        assert _chosen_text(tokenizer, episode) == [turn.action]
        assert len(tokenizer.encode(turn.action)) == 3
        (whole,) = _episodes(make_worker().collect(_orders(1)))
        assert whole.turns[0].complete

    def test_the_context_limit_shortens_replies_and_then_ends_the_episode(
        self, make_worker: Any
    ) -> None:
        worker = make_worker(_wrong, engine={"max_context": 40}, max_new_tokens=8)
        (episode,) = _episodes(worker.collect(_orders(8)))
        assert episode.ended == "context" and 0 < len(episode.turns) < 8
        rooms = [request.max_new_tokens for request in worker.engine.requests]
        assert rooms == [min(8, 40 - len(request.ids)) for request in worker.engine.requests]
        assert rooms[0] == 8 and rooms[-1] < 8
        assert len(episode.rows[0].ids_T) <= 40

    def test_a_first_prompt_beyond_the_context_is_a_lost_episode(self, make_worker: Any) -> None:
        """In training nothing is learned from it; in an evaluation it is not solved."""
        worker = make_worker(engine={"max_context": 3})
        (lost,) = worker.collect(_orders(2))
        assert isinstance(lost, Dropped) and lost.reason == "too long"
        assert re.match(
            r"its first prompt has \d+ tokens, and the student's context is 3", lost.why
        )
        (episode,) = _episodes(worker.collect(_orders(2), sampling=SamplingParams(temperature=0.0)))
        assert (episode.ended, episode.rows, episode.turns) == ("context", (), ())
        assert not episode.success


class TestFaults:
    @pytest.mark.parametrize("where", ["reset", 2])
    def test_a_failing_environment_is_tried_again_from_the_start(
        self, make_worker: Any, tokenizer: Any, where: str | int
    ) -> None:
        Scripted.faults[3] = [where, where]
        first, other = _episodes(make_worker(attempts=3).collect(_orders(3, 2)))
        assert (first.attempts, first.success, other.attempts) == (3, True, 1)
        assert _chosen_text(tokenizer, first) == ["3<|end|>", "2<|end|>", "1<|end|>"]
        assert first.turns[0].observation == "count from 3"
        assert {seed for index, seed in Scripted.seeds if index == 3} == {100}

    def test_after_the_last_attempt_it_is_dropped_counted_and_named(self, make_worker: Any) -> None:
        Scripted.faults[3] = [2] * 10
        worker = make_worker(attempts=3)
        dropped, episode = worker.collect(_orders(3, 2))
        assert isinstance(dropped, Dropped) and isinstance(episode, Episode)
        assert (dropped.order.index, dropped.reason, dropped.attempts) == (3, "raised", 3)
        assert "the kitchen is on fire" in dropped.detail
        assert len(Scripted.faults[3]) == 10 - 3
        assert worker.engine.pending == 0

    def test_a_process_that_dies_takes_only_its_episode_with_it(
        self, make_worker: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One order's first reply kills the process that it shares with two others, every time.
        Their last attempt is played alone: the killer is dropped, the others end well."""
        monkeypatch.syspath_prepend(Path(__file__).parent)

        def say(prompt: str) -> str:
            return "die 3" if "index 6" in prompt else "end"

        worker = make_worker(say, env="pool_envs:Faulty-v0", processes=1, attempts=2)
        first, dropped, last = worker.collect(_orders(5, 6, 4))
        assert isinstance(dropped, Dropped)
        assert (dropped.reason, dropped.attempts) == ("died", 2)
        assert "exit code 3" in dropped.detail
        for episode in _episodes([first, last]):
            assert (episode.success, episode.reward, episode.attempts) == (True, 1.0, 2)
        assert worker._pools["t"].restarts == 2

    def test_an_error_leaves_nothing_in_flight(self, make_worker: Any) -> None:
        """Here an expert that is not there, asked in the middle of others' turns."""
        for kind in ("full", "window"):
            worker = make_worker(
                env_args={"expert": False},
                context={"kind": kind},
                engine={"lockstep": False},
            )
            orders = [Order(task="t", number=i, seed=i, index=3, labels=i == 2) for i in range(3)]
            with pytest.raises(ValueError, match=r"'t'.*info\['expert_action'\].*Scripted-v0"):
                worker.collect(orders)
            assert worker.engine.pending == 0
            assert worker._pools["t"].outstanding == 0
            (again,) = _episodes(worker.collect(_orders(2)))
            assert len(again.turns) == 2


class TestExperts:
    def test_an_experts_episode_is_its_own_words_without_logprobs(
        self, make_worker: Any, tokenizer: Any
    ) -> None:
        worker = make_worker(_wrong)
        (episode,) = _episodes(worker.collect(_orders(3, actor="expert", labels=True)))
        assert episode.success and not worker.engine.requests
        assert _chosen_text(tokenizer, episode) == ["3<|end|>", "2<|end|>", "1<|end|>"]
        (row,) = episode.rows
        assert np.isnan(row.behavior_logprobs_T).all() and not row.branches_T.any()
        assert [turn.expert_action for turn in episode.turns] == ["3", "2", "1"]

    @pytest.mark.parametrize("kind", ["full", "window"])
    def test_labels_are_the_experts_actions_in_the_students_states(
        self, make_worker: Any, tokenizer: Any, kind: str
    ) -> None:
        worker = make_worker(_wrong, context={"kind": kind})
        (episode,) = _episodes(worker.collect(_orders(3, labels=True)))
        assert not episode.success  # the student acted
        assert [turn.action for turn in episode.turns] == ["look"] * 3
        assert [turn.expert_action for turn in episode.turns] == ["3", "2", "1"]
        labels = [
            tokenizer.decode(row.ids_T[row.turns_T == turn].tolist())
            for row in episode.rows
            for turn in range(3)
            if (row.turns_T == turn).any()
        ]
        assert labels == ["3<|end|>", "2<|end|>", "1<|end|>"]
        assert all(np.isnan(row.behavior_logprobs_T).all() for row in episode.rows)

    def test_without_labels_the_students_own_tokens_are_chosen(self, make_worker: Any) -> None:
        (episode,) = _episodes(make_worker().collect(_orders(3)))
        (row,) = episode.rows
        assert np.isfinite(row.behavior_logprobs_T[row.action_mask_T]).all()
        assert [turn.expert_action for turn in episode.turns] == [None] * 3


class TestWindow:
    def test_a_window_is_a_session_of_its_own_each_turn(self, make_worker: Any) -> None:
        """The engine refuses a prompt that does not extend the session's last one."""
        worker = make_worker(_wrong, context={"kind": "window", "turns": 1})
        (episode,) = _episodes(worker.collect(_orders(3)))
        assert len(episode.rows) == 3
        assert len(worker.engine.requests) == 3
        assert worker.engine.released == [1, 1, 1, 1]  # after each reply, and at the end


class TestLaws:
    def test_the_tasks_law_is_used_and_recorded(self, make_worker: Any) -> None:
        sampling = SamplingParams(temperature=0.7, top_p=0.9)
        worker = make_worker(temperature=sampling.temperature, top_p=sampling.top_p)
        (episode,) = _episodes(worker.collect(_orders(1)))
        assert episode.sampling == sampling == worker.engine.requests[0].sampling

    def test_evaluation_replaces_it(self, make_worker: Any) -> None:
        worker = make_worker()
        (episode,) = _episodes(worker.collect(_orders(1), sampling=GREEDY))
        assert episode.sampling == GREEDY == worker.engine.requests[0].sampling


def test_success_is_a_positive_reward_where_the_environment_does_not_say(
    make_worker: Any,
) -> None:
    right = make_worker(env_args={"says_success": False}).collect(_orders(2))
    wrong = make_worker(_wrong, env_args={"says_success": False}).collect(_orders(2))
    assert [e.success for e in _episodes([*right, *wrong])] == [True, False]


@pytest.mark.parametrize("length", [0, 2])  # to its end, and cut off there
def test_rewards_whose_sum_is_no_number_lose_the_episode(make_worker: Any, length: int) -> None:
    args = {"bonus": 1.5e308, "length": length}
    (lost,) = make_worker(env_args=args).collect(_orders(4))
    assert isinstance(lost, Dropped) and lost.reason == "garbage"
    assert "add up to inf" in lost.detail


def test_nothing_ordered_is_nothing_played(make_worker: Any) -> None:
    assert make_worker().collect([]) == []


def test_the_environments_count_is_passed_on(make_worker: Any) -> None:
    assert make_worker().num_episodes("t") == 9


def test_an_environment_that_cannot_be_made_is_named(make_worker: Any) -> None:
    with pytest.raises(ValueError, match="Scripted-v0"):
        make_worker(env_args={"lenght": 3}).collect(_orders(1))


class TestGuidance:
    """Part of an episode is another's: whole turns first, then the beginning of one."""

    @pytest.mark.parametrize(
        ("guide", "given"),
        [
            # 4 turns of 2 tokens each ("4<|end|>"); max_turns 4, max_new_tokens 8: of 32 tokens
            (0.0, [0, 0, 0, 0]),
            (0.25, [2, 0, 0, 0]),  # one whole turn
            (0.29, [2, 1, 0, 0]),  # and one token (0.16 turns: 1.28 tokens) of the next
            (0.5, [2, 2, 0, 0]),
            (1.0, [2, 2, 2, 2]),
        ],
    )
    def test_the_expert_gives_a_prefix_and_the_student_goes_on(
        self, make_worker: Any, tokenizer: Any, guide: float, given: list[int]
    ) -> None:
        worker = make_worker(_wrong, max_turns=4, max_new_tokens=8)
        (episode,) = _episodes(worker.collect(_orders(4, guide=guide)))
        (row,) = episode.rows
        for turn, count in enumerate(given):
            inside = row.turns_T == turn
            sampled = np.isfinite(row.behavior_logprobs_T[inside])
            assert sampled.tolist() == [False] * count + [True] * (inside.sum() - count)
            assert (np.isfinite(row.sampling_T[inside]) == sampled).all()
            said = tokenizer.decode(row.ids_T[inside].tolist())
            right = f"{4 - turn}<|end|>"
            assert said == {0: "look<|end|>", 1: f"{4 - turn}look<|end|>", 2: right}[count]
            assert episode.turns[turn].action == said.removesuffix("<|end|>")
        assert episode.success == (guide == 1.0)

    def test_what_was_given_stands_in_the_students_prompt_and_counts_to_its_limit(
        self, make_worker: Any
    ) -> None:
        worker = make_worker(_wrong, max_turns=1, max_new_tokens=2)
        (episode,) = _episodes(worker.collect(_orders(3, guide=0.5)))
        (request,) = worker.engine.requests
        (row,) = episode.rows
        assert request.max_new_tokens == 1
        assert list(request.ids) == row.ids_T[: len(request.ids)].tolist()
        assert row.turns_T[len(request.ids) - 1] == 0  # the prompt ends with the expert's token

    @pytest.mark.parametrize("kind", ["full", "window"])
    def test_a_teacher_speaks_through_an_engine_of_its_own(
        self, make_worker: Any, tokenizer: Any, kind: str
    ) -> None:
        worker = make_worker(_wrong, max_turns=4, max_new_tokens=8, context={"kind": kind})
        guide = FakeEngine(tokenizer, lambda prompt: "4")
        worker._guides["t"] = guide
        guided, alone = _episodes(worker.collect([*_orders(4, guide=0.29), *_orders(0, 2)[1:]]))
        assert [request.max_new_tokens for request in guide.requests] == [8, 1]
        given = [int(np.isnan(r.behavior_logprobs_T[r.action_mask_T]).sum()) for r in guided.rows]
        assert given == ([3] if kind == "full" else [2, 1, 0, 0])
        assert not any(np.isnan(r.behavior_logprobs_T[r.action_mask_T]).any() for r in alone.rows)
        assert guide.pending == worker.engine.pending == 0
        seeds = [request.seed for request in (*guide.requests, *worker.engine.requests)]
        assert len(set(seeds)) == len(seeds)  # the teacher's draws are not the student's


@pytest.mark.parametrize(
    ("template", "reply", "right"),
    [
        ("<think>\\n", "It is \\boxed{7}", False),  # the thought never ended
        ("<think>\\n", "It is \\boxed{3}</think>\\boxed{7}", True),
        ("<think>\\n", "It is \\boxed{7}</think>", False),
        ("", "It is \\boxed{7}", True),
    ],
)
def test_a_thought_that_the_prompt_began_pays_only_once_it_has_ended(
    tokenizer: Any, tmp_path: Path, template: str, reply: str, right: bool
) -> None:
    """DeepSeek-R1's template puts "<think>" into the prompt, so that no reply shows it."""
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>THINK' }}{% endif %}"
    ).replace("THINK", template)
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "3+4", "answer": "7"}')
    how = rollout("tutelage/Math-v0", {"problems": str(problems)}, processes=0)
    worker = RolloutWorker(FakeEngine(thinking, lambda prompt: reply), thinking, {"t": how})
    (episode,) = _episodes(worker.collect(_orders(0)))
    worker.close()
    assert episode.success is right
    ids = episode.rows[0].ids_T[episode.rows[0].turns_T == 0].tolist()
    assert tokenizer.decode(ids) == f"{reply}<|end|>"  # what was sampled stays as it was
