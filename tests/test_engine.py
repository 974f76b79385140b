"""The transformers engine against full forwards of one sequence at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.rounding import FORWARD_SUMS, rounding
from tutelage.distill.engines.transformers import FORWARD, SlotCache, TransformersEngine, _parts
from tutelage.distill.models.student import Student
from tutelage.distill.objectives import DenseStudent, SparseStudent
from tutelage.scheduler.engine import Completion, Request
from tutelage.scheduler.episodes import GREEDY, SamplingParams

VOCABULARY = 101
LOGPROB = rounding(sums=FORWARD_SUMS, size=6.0)
"""Between log-probabilities: logits are within six."""
STOP = frozenset({3})
NEVER = frozenset({VOCABULARY + 1})


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture
def engine(model: Any) -> TransformersEngine:
    return TransformersEngine(Student(model, vocabulary=VOCABULARY))


def _request(session: int, ids: Sequence[int], **options: Any) -> Request:
    defaults: dict[str, Any] = {
        "max_new_tokens": 8,
        "stop_ids": NEVER,
        "sampling": SamplingParams(),
        "seed": session,
    }
    return Request(session=session, ids=list(ids), **(defaults | options))


def _run(engine: TransformersEngine, requests: Sequence[Request]) -> dict[int, Completion]:
    for request in requests:
        engine.submit(request)
    found: dict[int, Completion] = {}
    while engine.pending:
        for completion in engine.step():
            assert completion.session not in found
            found[completion.session] = completion
    return found


@torch.no_grad()
def _logprobs(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """log_softmax at temperature 1 after every prefix of `ids`, from one plain forward."""
    found: torch.Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(-1)
    return found


def _assert_exact(model: Any, prompt: Sequence[int], completion: Completion) -> None:
    """The recorded log-probabilities are those of a full forward over prompt and reply."""
    logprobs_TV = _logprobs(model, [*prompt, *completion.ids])
    expected = [
        logprobs_TV[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion.ids)
    ]
    assert completion.logprobs == pytest.approx(expected, abs=LOGPROB)


def _prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(i) for i in rng.integers(4, VOCABULARY, n)] for n in lengths]


class TestOneRequest:
    def test_greedy_is_the_argmax_of_full_forwards(
        self, model: Any, engine: TransformersEngine
    ) -> None:
        (prompt,) = _prompts([7])
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(_logprobs(model, ids)[-1].argmax()))
        request = _request(1, prompt, max_new_tokens=12, sampling=GREEDY)
        assert _run(engine, [request])[1].ids == ids[7:]

    @pytest.mark.parametrize(
        "sampling",
        [GREEDY, SamplingParams(), SamplingParams(temperature=0.5), SamplingParams(top_p=0.7)],
        ids=["greedy", "plain", "cool", "nucleus"],
    )
    def test_logprobs_are_at_temperature_one_over_the_whole_vocabulary(
        self, model: Any, engine: TransformersEngine, sampling: SamplingParams
    ) -> None:
        """Whatever law drew the token."""
        (prompt,) = _prompts([5])
        completion = _run(engine, [_request(1, prompt, sampling=sampling, seed=77)])[1]
        assert len(completion.ids) == 8
        _assert_exact(model, prompt, completion)

    @pytest.mark.parametrize(
        "sampling",
        [
            SamplingParams(temperature=0.5),
            SamplingParams(temperature=1.7),
            SamplingParams(top_p=0.6),
            SamplingParams(temperature=0.7, top_p=0.8),
        ],
        ids=["cool", "hot", "nucleus", "both"],
    )
    def test_the_laws_own_logprobs_are_those_of_its_draws(
        self, model: Any, engine: TransformersEngine, sampling: SamplingParams
    ) -> None:
        """Tempered, cut by hand to the fewest tokens with the mass, renormalised."""
        prompts = _prompts([5, 3, 9])
        requests = [
            _request(i, ids, sampling=sampling, seed=i + 7) for i, ids in enumerate(prompts)
        ]
        # a batch of mixed laws: none of them is another's
        others = [SamplingParams(), GREEDY]
        requests += [_request(10 + i, prompts[0], sampling=other) for i, other in enumerate(others)]
        found = _run(engine, requests)
        for i, prompt in enumerate(prompts):
            said = found[i]
            assert said.sampling_logprobs is not None
            logprobs_TV = _logprobs(model, [*prompt, *said.ids])
            probs_TV = (logprobs_TV[len(prompt) - 1 : -1] / sampling.temperature).softmax(-1)
            for token, logprob, probs_V in zip(
                said.ids, said.sampling_logprobs, probs_TV, strict=True
            ):
                mass, kept = 0.0, []
                for v in sorted(range(len(probs_V)), key=lambda v, p=probs_V: -p[v]):
                    if mass >= sampling.top_p:
                        break
                    mass += probs_V[v].item()
                    kept.append(v)
                assert token in kept
                assert logprob == pytest.approx(math.log(probs_V[token].item() / mass), abs=1e-4)
        assert found[10].sampling_logprobs == found[10].logprobs  # to the bit: w is 1
        assert found[11].sampling_logprobs == [0.0] * len(found[11].ids)
        assert any(
            abs(a - b) > 0.05 for a, b in zip(said.logprobs, said.sampling_logprobs, strict=True)
        )

    def test_the_student_says_of_a_law_what_the_engine_does(
        self, model: Any, engine: TransformersEngine
    ) -> None:
        """So that an engine that does not know it can be helped; whole logits and gathered ones."""
        for sampling in (
            GREEDY,
            SamplingParams(),
            SamplingParams(temperature=0.7, top_p=0.8),
            SamplingParams(top_p=0.3),
        ):
            (prompt,) = _prompts([5])
            said = _run(engine, [_request(1, prompt, sampling=sampling, seed=77)])[1]
            engine.release(1)
            ids_T = torch.tensor([*prompt, *said.ids])
            with torch.no_grad():
                hidden_ND = model.base_model(input_ids=ids_T[None]).last_hidden_state[0]
                hidden_ND = hidden_ND[len(prompt) - 1 : -1]
                head = model.get_output_embeddings()
                for student in (
                    DenseStudent(head(hidden_ND)[:, :VOCABULARY]),
                    SparseStudent(hidden_ND, head, vocabulary=VOCABULARY),
                ):
                    found_N = student.sampling_logprobs_at(
                        ids_T[len(prompt) :], temperature=sampling.temperature, top_p=sampling.top_p
                    )
                    assert found_N.tolist() == pytest.approx(said.sampling_logprobs, abs=1e-4)

    @pytest.mark.parametrize(
        ("probs", "top_p", "wanted"),
        [
            ([0.25, 0.25, 0.25, 0.25], 0.5, 0.5),  # two of four, whichever was drawn
            ([0.4, 0.2, 0.2, 0.2], 0.5, 1 / 3),
            ([0.5, 0.3, 0.2, 0.0], 0.5, 0.2),  # beyond the edge, by rounding alone
        ],
    )
    def test_of_tokens_as_probable_as_the_drawn_one_no_more_are_in_than_fit(
        self, probs: list[float], top_p: float, wanted: float
    ) -> None:
        """Logits in bfloat16 often are equal: one drawn does not take its whole group along."""
        student = DenseStudent(torch.tensor([probs]).log())
        found_N = student.sampling_logprobs_at(torch.tensor([2]), temperature=1.0, top_p=top_p)
        assert found_N.exp().item() == pytest.approx(wanted)

    def test_a_stop_id_ends_the_reply_and_is_kept(
        self, model: Any, engine: TransformersEngine
    ) -> None:
        (prompt,) = _prompts([5])
        whole = _run(engine, [_request(1, prompt)])[1]
        assert not whole.stopped and len(whole.ids) == 8
        stop = whole.ids[4]
        first = whole.ids.index(stop)
        ended = _run(engine, [_request(2, prompt, seed=1, stop_ids=frozenset({stop}))])[2]
        assert ended.stopped and ended.ids == whole.ids[: first + 1]
        last = _run(
            engine,
            [_request(3, prompt, seed=1, max_new_tokens=first + 1, stop_ids=frozenset({stop}))],
        )[3]
        assert last.stopped  # on the last token that fits, too

    def test_the_same_seed_repeats_and_another_differs(self, engine: TransformersEngine) -> None:
        (prompt,) = _prompts([5])
        found = _run(
            engine, [_request(i, prompt, seed=seed) for i, seed in enumerate([5, 5, 6, 7])]
        )
        assert found[0].ids == found[1].ids
        assert len({tuple(found[i].ids) for i in (0, 2, 3)}) == 3


class TestSessions:
    @staticmethod
    def _talk(
        engine: TransformersEngine, turns: int, *, fresh: bool
    ) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
        """Eight ragged conversations of several turns; fresh: each turn is a session of its own
        that is given the whole history. Returns ids and log-probabilities of all replies."""
        rng = np.random.default_rng(3)
        histories = dict(enumerate(_prompts([1, 4, 9, 30, 2, 17, 5, 8])))
        logprobs: dict[int, list[float]] = {i: [] for i in histories}
        for turn in range(turns):
            requests = [
                _request(
                    1000 * turn + i if fresh else i,
                    ids,
                    seed=100 * turn + i,
                    max_new_tokens=int(rng.integers(1, 12)),
                    stop_ids=frozenset(range(30)),
                )
                for i, ids in histories.items()
            ]
            for session, completion in _run(engine, requests).items():
                i = session % 1000
                observation = [int(x) for x in rng.integers(4, VOCABULARY, 1 + (i + turn) % 4)]
                logprobs[i] += completion.logprobs
                histories[i] = [*histories[i], *completion.ids, *observation]
        return histories, logprobs

    def test_cached_turns_equal_fresh_sessions_with_the_whole_prompt(self, model: Any) -> None:
        cached = TransformersEngine(Student(model, vocabulary=VOCABULARY))
        fresh = TransformersEngine(Student(model, vocabulary=VOCABULARY))
        ids, logprobs = self._talk(cached, 5, fresh=False)
        fresh_ids, fresh_logprobs = self._talk(fresh, 5, fresh=True)
        assert ids == fresh_ids
        for i in ids:
            assert logprobs[i] == pytest.approx(fresh_logprobs[i], abs=LOGPROB)
        assert cached.generated_tokens == fresh.generated_tokens

    def test_history_is_never_prefilled_again(self, engine: TransformersEngine) -> None:
        """Only the last sampled token (never fed yet) and the new observation."""
        first, observation = _prompts([40, 6])
        reply = _run(engine, [_request(1, first)])[1].ids
        before = engine.prefilled_tokens
        _run(engine, [_request(1, [*first, *reply, *observation])])
        assert before == 40 and engine.prefilled_tokens - before == 1 + 6

    def test_history_is_append_only(self, engine: TransformersEngine) -> None:
        (prompt,) = _prompts([6])
        reply = _run(engine, [_request(1, prompt)])[1].ids
        history = [*prompt, *reply]
        changed = [*history[:2], history[2] + 1, *history[3:], 50]
        for ids in (changed, prompt, history[:-1]):
            with pytest.raises(ValueError, match=r"session 1.*append-only"):
                engine.submit(_request(1, ids))
        assert engine.pending == 0
        engine.release(1)
        engine.submit(_request(1, changed))  # a released session begins anew
        assert engine.pending == 1

    def test_a_second_request_while_the_first_is_in_flight_is_refused(
        self, engine: TransformersEngine
    ) -> None:
        """Both would write into one slot."""
        (prompt,) = _prompts([6])
        engine.submit(_request(1, prompt))
        with pytest.raises(ValueError, match=r"session 1 .*in flight"):
            engine.submit(_request(1, [*prompt, 7]))
        engine.step()
        with pytest.raises(ValueError, match=r"session 1 .*in flight"):
            engine.submit(_request(1, [*prompt, 7, 8, 9]))
        assert engine.pending == 1


class TestBatches:
    """Nothing else in flight changes a request's result."""

    @staticmethod
    def _alone(model: Any, request: Request) -> Completion:
        return _run(TransformersEngine(Student(model, vocabulary=VOCABULARY)), [request])[
            request.session
        ]

    def _assert_as_alone(
        self, model: Any, requests: Sequence[Request], found: dict[int, Completion]
    ) -> None:
        for request in requests:
            alone, together = self._alone(model, request), found[request.session]
            assert together.ids == alone.ids, request.session
            assert together.stopped == alone.stopped
            assert together.logprobs == pytest.approx(alone.logprobs, abs=LOGPROB)

    def test_ragged_prompts_limits_and_laws(self, model: Any, engine: TransformersEngine) -> None:
        """40 at once: more than one growth of the slots, early finishers, greedy beside sampled."""
        rng = np.random.default_rng(8)
        laws = [
            GREEDY,
            SamplingParams(),
            SamplingParams(top_p=0.8),
            SamplingParams(temperature=1.5, top_p=0.9),
        ]
        requests = [
            _request(
                i,
                prompt,
                max_new_tokens=int(rng.integers(1, 25)),
                sampling=laws[i % 4],
                stop_ids=frozenset(range(8)),
            )
            for i, prompt in enumerate(_prompts([int(n) for n in rng.integers(1, 60, 40)]))
        ]
        found = _run(engine, requests)
        assert len({len(completion.ids) for completion in found.values()}) > 8
        self._assert_as_alone(model, requests, found)

    @given(
        lengths=st.lists(st.integers(1, 400), min_size=1, max_size=60), most=st.integers(1, 9999)
    )
    def test_chunks_are_grouped_by_length_where_padding_costs_more_than_a_forward(
        self, lengths: list[int], most: int
    ) -> None:
        parts = list(_parts(lengths, most=most))
        assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
        padded = [len(part) * max(lengths[i] for i in part) for part in parts]
        assert all(n <= most or len(part) == 1 for part, n in zip(parts, padded, strict=True))
        whole = len(lengths) * max(lengths)
        if whole <= most:
            assert sum(padded) + FORWARD * (len(parts) - 1) <= whole
        if len(parts) == 1:  # no single cut would have paid
            sizes = sorted(lengths, reverse=True)
            cuts = range(1, len(sizes))
            assert all((sizes[0] - sizes[i]) * (len(sizes) - i) <= FORWARD for i in cuts)

    def test_prefill_in_parts(self, model: Any) -> None:
        engine = TransformersEngine(Student(model, vocabulary=VOCABULARY), prefill_tokens=64)
        requests = [_request(i, prompt) for i, prompt in enumerate(_prompts([20] * 7 + [3] * 4))]
        self._assert_as_alone(model, requests, _run(engine, requests))

    def test_requests_that_come_while_others_run(
        self, model: Any, engine: TransformersEngine
    ) -> None:
        """Sessions of several turns join, finish and come back at different times, so that slots
        are swapped, freed and taken again; every reply is exact for its own history."""
        rng = np.random.default_rng(2)
        histories = dict(enumerate(_prompts([int(n) for n in rng.integers(1, 40, 30)], seed=1)))
        waiting, turns, submitted = list(histories), Counter[int](), {}
        replies = 0
        while waiting or engine.pending:
            for _ in range(int(rng.integers(0, 4))):
                if waiting:
                    session = waiting.pop(int(rng.integers(len(waiting))))
                    submitted[session] = _request(
                        session,
                        histories[session],
                        seed=10 * session + turns[session],
                        max_new_tokens=int(rng.integers(1, 14)),
                        stop_ids=frozenset(range(10)),
                    )
                    engine.submit(submitted[session])
            for completion in engine.step():
                session = completion.session
                request = submitted.pop(session)
                alone = self._alone(model, request)
                assert completion.ids == alone.ids
                assert completion.logprobs == pytest.approx(alone.logprobs, abs=LOGPROB)
                replies += 1
                turns[session] += 1
                if turns[session] < 3:
                    histories[session] = [*request.ids, *completion.ids, 50, 51 + turns[session]]
                    waiting.append(session)
                elif session % 2:
                    engine.release(session)
        assert replies == 90

    @pytest.mark.parametrize("released", [[0], [1], [5], [0, 1], [0, 1, 2, 3], [4, 5]])
    def test_release_in_mid_flight(
        self, model: Any, engine: TransformersEngine, released: list[int]
    ) -> None:
        """The rest go on as if nothing had been; the released never complete."""
        requests = [
            _request(i, prompt, max_new_tokens=12) for i, prompt in enumerate(_prompts([9] * 6))
        ]
        for request in requests:
            engine.submit(request)
        found = {c.session: c for _ in range(4) for c in engine.step()}
        assert not found
        for session in released:
            engine.release(session)
        assert engine.pending == 6 - len(released)
        newcomer = _request(99, [5, 6, 7], max_new_tokens=9)
        found = _run(engine, [newcomer])
        rest = [request for request in requests if request.session not in released]
        assert set(found) == {99} | {request.session for request in rest}
        self._assert_as_alone(model, [*rest, newcomer], found)

    def test_a_window_released_at_every_reply(self, model: Any, engine: TransformersEngine) -> None:
        """As rollouts with a window context do, some replies being shorter than others."""
        prompts = _prompts([6, 11, 3, 8, 5])
        for turn in range(4):
            requests = [
                _request(
                    -1 - i,
                    [*prompt, 60 + turn],
                    max_new_tokens=2 + (i + turn) % 5 * 3,
                    seed=turn,
                )
                for i, prompt in enumerate(prompts)
            ]
            for request in requests:
                engine.submit(request)
            found = {}
            while engine.pending:
                for completion in engine.step():
                    found[completion.session] = completion
                    engine.release(completion.session)
            self._assert_as_alone(model, requests, found)

    def test_queued_requests_can_be_released(self, engine: TransformersEngine) -> None:
        for i, prompt in enumerate(_prompts([4, 4])):
            engine.submit(_request(i, prompt))
        engine.release(0)
        assert engine.pending == 1
        engine.step()
        assert set(_run(engine, [])) == {1}

    def test_slots_are_used_again(self, engine: TransformersEngine) -> None:
        """A thousand short sessions need no more room than those that live at once."""
        for i in range(100):
            _run(engine, [_request(10 * i + j, [5, 6], max_new_tokens=1) for j in range(6)])
            for j in range(6):
                engine.release(10 * i + j)
        assert engine._cache.slots == 8


def test_a_cache_that_grows_token_by_token_copies_each_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a fixed number of positions each time, 8K of them would be copied 16 times over."""
    cache, copied, grown = SlotCache(), 0, SlotCache._grown
    cache.reserve(1, 1)
    cache.keys = [torch.zeros(1, 1, cache.room, 1)]

    def counted(old: torch.Tensor, slots: int, room: int) -> torch.Tensor:
        nonlocal copied
        copied += old.shape[2]
        return grown(old, slots, room)

    monkeypatch.setattr(SlotCache, "_grown", staticmethod(counted))
    for room in range(1, 8193):
        cache.reserve(1, room)
        assert cache.keys[0].shape[2] == cache.room >= room
    assert copied < 5 * 8192 and cache.room < 1.25 * 8192


def test_a_prompt_that_opens_is_read_without_a_mask_and_one_that_goes_on_with_one(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask has the square of a prompt's length for each row. Where one row of a batch goes on,
    all have one: the kernel's own would hide the row's past from it."""
    masks: list[tuple[int, ...] | None] = []
    decoder = engine._student.decoder

    def watched(ids_BT: torch.Tensor, **given: Any) -> torch.Tensor:
        mask = given["mask_B1TP"]
        if ids_BT.shape[1] > 1:
            masks.append(None if mask is None else tuple(mask.shape))
        return decoder(ids_BT, **given)

    monkeypatch.setattr(engine._student, "decoder", watched)
    first = _run(engine, [_request(1, range(4, 24)), _request(2, range(5, 15))])
    _run(engine, [_request(1, [*range(4, 24), *first[1].ids, 7, 8]), _request(3, range(6, 12))])
    assert masks[0] is None and None not in masks[1:]


class TestSampling:
    SEEDS = 4000

    def _frequencies(
        self, engine: TransformersEngine, prompt: list[int], sampling: SamplingParams
    ) -> np.ndarray:
        """How often each id comes first, over many seeds."""
        counts = np.zeros(VOCABULARY)
        for start in range(0, self.SEEDS, 500):
            requests = [
                _request(seed, prompt, sampling=sampling, seed=seed, max_new_tokens=1)
                for seed in range(start, start + 500)
            ]
            for completion in _run(engine, requests).values():
                counts[completion.ids[0]] += 1
                engine.release(completion.session)
        return counts

    @pytest.mark.parametrize(
        ("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.0, 0.6), (1.0, 0.3)]
    )
    def test_frequencies_are_the_laws(
        self, model: Any, engine: TransformersEngine, temperature: float, top_p: float
    ) -> None:
        """Temperature first, then the nucleus, renormalised; chi-squared against exact
        probabilities. Seeds 0..3999 are a user's seeds: neighbours must be independent."""
        (prompt,) = _prompts([5], seed=4)
        logits = _logprobs(model, prompt)[-1].double()
        probs = (logits / temperature).softmax(-1).numpy()
        order = np.argsort(-probs)
        kept = order[: int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1]
        expected = np.zeros(VOCABULARY)
        expected[kept] = probs[kept] / probs[kept].sum()
        counts = self._frequencies(
            engine, prompt, SamplingParams(temperature=temperature, top_p=top_p)
        )
        assert counts[expected == 0].sum() == 0
        assert 2 <= len(kept) <= VOCABULARY
        big = expected * self.SEEDS >= 5
        seen = np.append(counts[big], counts[~big].sum())
        wanted = self.SEEDS * np.append(expected[big], expected[~big].sum())
        seen, wanted = seen[wanted > 0], wanted[wanted > 0]
        chi = ((seen - wanted) ** 2 / wanted).sum()
        freedom = len(wanted) - 1
        # Mean and deviation of chi-squared: six deviations above is one in 10^6 or less.
        assert chi < freedom + 6 * np.sqrt(2 * freedom), (chi, freedom)

    def test_successive_tokens_are_drawn_apart(
        self, model: Any, engine: TransformersEngine
    ) -> None:
        """Two tokens by one request: their joint frequencies are the chain rule's. One number
        reused for both draws would tie them together."""
        prompt = [5]
        first = _logprobs(model, prompt)[-1].exp()
        a = int(first.argmax())
        second = _logprobs(model, [*prompt, a])[-1].exp()
        b = int(second.argmax())
        both = 0
        for start in range(0, 2000, 500):
            requests = [
                _request(seed, prompt, seed=seed, max_new_tokens=2)
                for seed in range(start, start + 500)
            ]
            for completion in _run(engine, requests).values():
                both += completion.ids == [a, b]
                engine.release(completion.session)
        p = float(first[a] * second[b])
        assert 0.01 < p < 0.9
        assert abs(both - 2000 * p) < 5 * np.sqrt(2000 * p * (1 - p))

    def test_a_tiny_nucleus_is_greedy(self, model: Any, engine: TransformersEngine) -> None:
        (prompt,) = _prompts([5])
        found = _run(
            engine,
            [
                _request(1, prompt, sampling=SamplingParams(top_p=1e-6), seed=9),
                _request(2, prompt, sampling=GREEDY),
            ],
        )
        assert found[1].ids == found[2].ids


class TestLimits:
    def test_padded_ids_are_never_sampled_and_take_no_probability(
        self, make_model: Callable[..., Any]
    ) -> None:
        """The embedding has rows beyond the vocabulary, here the likeliest of all."""
        model = make_model(vocabulary=20, padding=12, seed=2)
        with torch.no_grad():
            model.lm_head.weight[20:] = 10 * model.lm_head.weight[:12].sign()
        engine = TransformersEngine(Student(model, vocabulary=20))
        requests = [_request(i, [5, 6, 7], seed=i) for i in range(40)]
        requests.append(_request(40, [5, 6, 7], sampling=GREEDY))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1]
        assert logits[20:].max() > logits[:20].max()
        for completion in _run(engine, requests).values():
            assert max(completion.ids) < 20
            assert completion.logprobs[0] == pytest.approx(
                logits[:20].log_softmax(-1)[completion.ids[0]].item(), abs=LOGPROB
            )

    def test_a_reply_can_fill_the_context_to_its_last_place(
        self, model: Any, engine: TransformersEngine
    ) -> None:
        assert engine.max_context == 512
        (prompt,) = _prompts([500])
        completion = _run(engine, [_request(1, prompt, max_new_tokens=12)])[1]
        assert len(completion.ids) == 12
        _assert_exact(model, prompt, completion)

    @pytest.mark.parametrize(("length", "new"), [(500, 13), (512, 1), (5, 0), (600, 5)])
    def test_more_than_the_context_holds_is_refused(
        self, engine: TransformersEngine, length: int, new: int
    ) -> None:
        with pytest.raises(ValueError, match=rf"max_new_tokens={new} after {length} ids.*512"):
            engine.submit(_request(1, [5] * length, max_new_tokens=new))
        assert engine.pending == 0

    def test_an_empty_prompt_is_refused(self, engine: TransformersEngine) -> None:
        with pytest.raises(ValueError, match="session 1"):
            engine.submit(_request(1, []))


class TestWeights:
    def test_new_weights_are_used_and_old_caches_dropped(
        self, make_model: Callable[..., Any]
    ) -> None:
        other = make_model(seed=5)
        engine = TransformersEngine(Student(make_model(), vocabulary=VOCABULARY))
        (prompt,) = _prompts([6])
        reply = _run(engine, [_request(1, prompt)])[1].ids
        weights = {name: tensor.numpy() for name, tensor in other.state_dict().items()}
        engine.load(weights, version=3)
        assert engine.version == 3
        history = [*prompt, *reply, 50]
        completion = _run(engine, [_request(1, history)])[1]
        _assert_exact(other, history, completion)

    def test_shared_weights_are_seen_after_a_load(self, make_model: Callable[..., Any]) -> None:
        """None: the learner trains the same model in place."""
        model = make_model()
        engine = TransformersEngine(Student(model, vocabulary=VOCABULARY))
        (prompt,) = _prompts([6])
        _run(engine, [_request(1, prompt)])
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-1.0)
        engine.load(None, version=1)
        _assert_exact(model, prompt, _run(engine, [_request(1, prompt)])[1])

    def test_missing_weights_are_named(self, make_model: Callable[..., Any]) -> None:
        model = make_model()
        engine = TransformersEngine(Student(model, vocabulary=VOCABULARY))
        weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        del weights["lm_head.weight"]
        with pytest.raises(ValueError, match=r"lack 'lm_head\.weight'"):
            engine.load(weights, version=1)

    def test_weights_do_not_change_under_a_running_request(
        self, engine: TransformersEngine
    ) -> None:
        engine.submit(_request(1, [5, 6]))
        with pytest.raises(RuntimeError, match="1 requests are in flight"):
            engine.load(None, version=1)

    def test_broken_weights_stop_the_rollout(self, make_model: Callable[..., Any]) -> None:
        model = make_model()
        with torch.no_grad():
            model.lm_head.weight[3, 0] = torch.nan
        engine = TransformersEngine(Student(model, vocabulary=VOCABULARY))
        engine.submit(_request(1, [5, 6]))
        with pytest.raises(FloatingPointError, match="NaN"):
            engine.step()
