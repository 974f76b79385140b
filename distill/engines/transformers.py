"""The transformers rollout engine: many multi-turn sessions in one batch, each with its own cache.

A session owns a slot of one big cache, in which a token's index is its position. So one rule, key
position <= query position, masks padding, ragged lengths, prefill and decoding alike, and only a
turn's new tokens are ever prefilled. Left out: paged memory and batches that mix prefill with
decoding; for those there is vLLM.

Letters: B batch rows, Q query tokens, H key-value heads, P positions in a slot, V vocabulary, D
head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.models.architecture import context_of, window_of
from tutelage.distill.models.student import Student
from tutelage.distill.models.threads import fitting, matrix_size
from tutelage.distill.models.weights import weight_of
from tutelage.envs.errors import one_line
from tutelage.scheduler.engine import Completion, Request, Weights

CHUNK = 256
"""A slot's room grows by at least this many positions."""

FORWARD = 64
"""What a forward costs beside its tokens, in tokens: its operators are called however few there
are."""


class SlotCache:
    """Keys and values of every session, per layer [slots, H, P, D]; a model takes it for its cache.

    Before a forward set `positions_BQ` (where the tokens go), `reach` (how many positions the
    queries may look at) and `slots_B` (the rows' slots; None: the first B, which need no copy).
    """

    is_compileable = False  # transformers reads it of a cache

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.slots, self.room = 0, 0
        self.positions_BQ: torch.Tensor | None = None
        self.slots_B: torch.Tensor | None = None
        self.reach = 0

    def reserve(self, slots: int, room: int) -> None:
        """Grow to at least `slots` x `room`; what is stored stays."""
        if slots > self.slots or room > self.room:
            slots = max(slots, self.slots)
            # Growing copies the whole cache, so by CHUNK at least.
            room = max(room, self.room) if room <= self.room else max(room, self.room + CHUNK)
            self.keys = [self._grown(old, slots, room) for old in self.keys]
            self.values = [self._grown(old, slots, room) for old in self.values]
            self.slots, self.room = slots, room

    @staticmethod
    def _grown(old: torch.Tensor, slots: int, room: int) -> torch.Tensor:
        # zeros: the mask keeps probabilities off unwritten positions, but 0 * NaN would be NaN
        new = old.new_zeros(slots, old.shape[1], room, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def swap(self, left: Sequence[int], right: Sequence[int], filled: int) -> None:
        """Exchange the first `filled` positions of slots pairwise."""
        to, source = [*left, *right], [*right, *left]
        for tensor in (*self.keys, *self.values):
            tensor[to, :, :filled] = tensor[source, :, :filled]

    def update(
        self, keys_BHQD: torch.Tensor, values_BHQD: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values; return all that the queries may look at."""
        _rows, heads, _queries, size = keys_BHQD.shape
        if layer == len(self.keys):  # the first forward tells heads, head size, dtype and device
            shape = (self.slots, heads, self.room, size)
            self.keys.append(keys_BHQD.new_zeros(shape))
            self.values.append(values_BHQD.new_zeros(shape))
        keys, values = self.keys[layer], self.values[layer]
        return self._stored(keys, keys_BHQD), self._stored(values, values_BHQD)

    def _stored(self, kept: torch.Tensor, new_BHQD: torch.Tensor) -> torch.Tensor:
        rows, heads, _queries, size = new_BHQD.shape
        positions_BQ, slots_B = self.positions_BQ, self.slots_B
        assert positions_BQ is not None
        if slots_B is None:  # a view of the cache; indexing by slots, below, copies
            index = positions_BQ[:, None, :, None].expand(-1, heads, -1, size)
            return kept[:rows].scatter_(2, index, new_BHQD)[:, :, : self.reach]
        kept[slots_B[:, None], :, positions_BQ] = new_BHQD.transpose(1, 2)
        return kept[slots_B, :, : self.reach]

    def get_seq_length(self, *_: Any) -> int:
        """Models ask it to build a mask of their own; here the mask comes with the call."""
        return 0


@torch.inference_mode()
def check_cache(student: Student) -> None:
    """Refuse a model that keeps something other than keys and values of every position, such as a
    recurrent state, or nothing at all.

    Raises:
        ConfigError: it fails with our cache, or two tokens give other hidden states with it than
        without.
    """
    ids_1T = torch.tensor([[1, 2]], device=student.device)
    ids_1T %= student.rows
    mask_B1QP = torch.ones(1, 1, 1, 2, dtype=torch.bool, device=student.device)
    cache, parts = SlotCache(), []
    cache.reserve(1, 2)
    who = f"{type(student.model).__name__} (type {student.settings.model_type!r})"
    cure = "choose a student whose layers attend, such as llama or qwen2, or rollout.engine=vllm"
    try:
        for t in range(2):
            cache.positions_BQ, cache.reach = torch.tensor([[t]], device=student.device), t + 1
            parts.append(
                student.decoder(
                    ids_1T[:, t : t + 1],
                    positions_BT=cache.positions_BQ,
                    mask_B1TP=mask_B1QP[..., : t + 1],
                    cache=cache,
                )
            )
        whole_1TD = student.decoder(ids_1T).float()
    except Exception as error:  # transformers' models raise what comes
        raise ConfigError(
            f"{who} cannot generate token by token here ({one_line(error):.300}): {cure}"
        ) from None
    apart = float((torch.cat(parts, dim=1).float() - whole_1TD).abs().max())
    # A tenth: bfloat16's rounding is far below it, a lost state far above. NaN compares as False
    # and passes: `_sample` names it.
    if apart > 0.1 * float(whole_1TD.abs().max()):
        raise ConfigError(
            f"{who} computes other hidden states token by token than in one piece: it keeps more"
            f" than keys and values: {cure}"
        )


@dataclass(slots=True)
class _Session:
    slot: int
    cached: list[int] = field(default_factory=list)  # ids whose keys and values the slot holds


@dataclass(slots=True)
class _Running:
    request: Request
    session: _Session
    draws: np.ndarray  # one uniform number for each token that may come
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    done: bool = False


class TransformersEngine:
    """Generates with a transformers causal language model, the learner's own or a copy of it.

    Args:
        student: its current weights are used at each call: the learner's own needs no copy. A
            teacher's model that generates comes as a student, too.
        prefill_tokens: at most about this many tokens go through one prefill forward.
    """

    lockstep = True

    def __init__(self, student: Student, *, prefill_tokens: int = 16_384) -> None:
        self._student, self.version = student, 0
        self._prefill_tokens, self._matrix_size = prefill_tokens, matrix_size(student)
        # Our mask has no sliding window: a layer with one would see more than it was trained on.
        # So no text is longer than the window.
        context = context_of(student.settings)
        self.max_context = min(context, window_of(student.settings) or context)
        check_cache(student)
        self._cache = SlotCache()
        self._sessions: dict[int, _Session] = {}
        self._free: list[int] = []
        self._queue: list[Request] = []
        self._batch: list[_Running] = []
        self._in_flight: set[int] = set()  # sessions that are owed a reply
        self.generated_tokens = 0
        self.prefilled_tokens = 0

    @property
    def pending(self) -> int:
        return len(self._in_flight)

    def load(self, weights: Weights | None, version: int) -> None:
        """Take weights by name (None: the student is the learner's own); drop caches of older
        ones."""
        if self.pending:
            raise RuntimeError(
                f"{self.pending} requests are in flight: load weights between rollouts"
            )
        if weights is not None:
            tensors = {name: weight_of(array) for name, array in weights.items()}
            self._student.take(tensors, version=version)
        self._sessions.clear()
        self._free = list(range(self._cache.slots))
        self._batch.clear()
        self.version = version

    def submit(self, request: Request) -> None:
        if request.session in self._in_flight:
            raise ValueError(f"session {request.session} has a request in flight: await its reply")
        session = self._sessions.get(request.session)
        cached = session.cached if session else []
        if list(request.ids[: len(cached)]) != cached or len(request.ids) <= len(cached):
            raise ValueError(
                f"session {request.session}: its {len(request.ids)} ids do not extend the"
                f" {len(cached)} cached ones: history is append-only, so release the session or"
                " keep its ids"
            )
        room = self.max_context - len(request.ids)
        if request.max_new_tokens < 1 or request.max_new_tokens > room:
            raise ValueError(
                f"max_new_tokens={request.max_new_tokens} after {len(request.ids)} ids: the model's"
                f" context of {self.max_context} leaves 1 to {room}"
            )
        self._in_flight.add(request.session)
        self._queue.append(request)

    def release(self, session: int) -> None:
        owned = self._sessions.pop(session, None)
        if owned is not None:
            self._free.append(owned.slot)
            # Only marked: its row stays in the batch, whose rows must fill the first slots.
            for row in self._batch:
                row.done = row.done or row.session is owned
        self._in_flight.discard(session)
        self._queue = [request for request in self._queue if request.session != session]

    def close(self) -> None:
        """Drop keys and values."""
        self._cache, self._sessions = SlotCache(), {}

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        running = [row for row in self._batch if not row.done]
        # Prefill once as many wait as still run: a forward costs about as much for one as for many.
        if self._queue and len(self._queue) >= len(running):
            self._prefill(running)
        elif running:
            self._decode(running)
        return self._collect()

    def _prefill(self, running: list[_Running]) -> None:
        """Feed every queued request's new ids and sample its first token."""
        fresh = [self._admit(request) for request in self._queue]
        self._queue.clear()
        self._batch = fresh + running
        reach = max(len(row.request.ids) + row.request.max_new_tokens for row in fresh)
        self._cache.reserve(self._cache.slots, reach)
        chunks = [row.request.ids[len(row.session.cached) :] for row in fresh]
        for part in _parts([len(chunk) for chunk in chunks], most=self._prefill_tokens):
            self._feed([fresh[i] for i in part], [chunks[i] for i in part], anywhere=True)
        self._bring_to_front([row.session for row in self._batch])

    def _admit(self, request: Request) -> _Running:
        session = self._sessions.get(request.session)
        if session is None:
            if not self._free:
                old = self._cache.slots
                self._cache.reserve(max(8, 2 * old), self._cache.room)
                self._free = list(range(old, self._cache.slots))
            self._free.sort(reverse=True)  # the lowest slot first: the batch uses the first ones
            session = self._sessions[request.session] = _Session(slot=self._free.pop())
        draws = np.random.default_rng(request.seed).random(request.max_new_tokens, dtype=np.float32)
        return _Running(request, session, draws)

    def _decode(self, running: list[_Running]) -> None:
        # Finished rows stay in the batch, their output unread, until they are a quarter of it:
        # moving slots costs more than computing them.
        if 4 * len(running) <= 3 * len(self._batch):
            self._batch = running
            self._bring_to_front([row.session for row in running])
        self._feed(self._batch, [row.ids[-1:] for row in self._batch])

    def _bring_to_front(self, sessions: Sequence[_Session]) -> None:
        """Move `sessions` into slots 0..n-1. Those that are there already stay where they are."""
        count = len(sessions)
        taken = {session.slot for session in sessions}
        holes = [slot for slot in range(count) if slot not in taken]
        outside = [session for session in sessions if session.slot >= count]
        if not holes:
            return
        filled = max(len(session.cached) for session in self._sessions.values())
        self._cache.swap(holes, [session.slot for session in outside], filled)
        owners = {session.slot: session for session in self._sessions.values()}
        for hole, session in zip(holes, outside, strict=True):  # the other side of each exchange
            if hole in owners:
                owners[hole].slot = session.slot
            else:
                self._free[self._free.index(hole)] = session.slot
            session.slot = hole

    def _feed(
        self, rows: list[_Running], chunks: list[Sequence[int]], *, anywhere: bool = False
    ) -> None:
        """One forward over rows in the first slots, or in any (`anywhere`); each row that still
        runs samples a token."""
        # In the order of slots: without slots_B the cache takes row i for slot i.
        order = sorted(range(len(rows)), key=lambda i: rows[i].session.slot)
        rows, chunks = [rows[i] for i in order], [chunks[i] for i in order]
        device = self._student.device
        lengths = [len(chunk) for chunk in chunks]
        past = [len(row.session.cached) for row in rows]
        width, reach = max(lengths), max(p + n for p, n in zip(past, lengths, strict=True))
        ids_BQ = np.zeros((len(rows), width), dtype=np.int64)
        for i, chunk in enumerate(chunks):
            ids_BQ[i, : lengths[i]] = chunk
        positions = np.asarray(past)[:, None] + np.arange(width)
        self._cache.reserve(self._cache.slots, max(reach, int(positions.max()) + 1))
        positions_BQ = torch.from_numpy(positions).to(device)
        mask_B1QP = torch.arange(reach, device=device) <= positions_BQ[:, None, :, None]
        slots = [row.session.slot for row in rows]
        self._cache.slots_B = torch.tensor(slots, device=device) if anywhere else None
        self._cache.positions_BQ, self._cache.reach = positions_BQ, reach
        with fitting(self._matrix_size, ids_BQ.size):
            last_BD = self._student.decoder(
                torch.from_numpy(ids_BQ).to(device),
                positions_BT=positions_BQ,
                mask_B1TP=mask_B1QP,
                cache=self._cache,
                at=(torch.arange(len(rows)), torch.tensor(lengths) - 1),
            )
            sampled = _sample(self._student.logits(last_BD).float(), rows)
        self.prefilled_tokens += sum(lengths) if width > 1 else 0  # width 1 is decoding
        for row, chunk, token, logprob, sampling in zip(rows, chunks, *sampled, strict=True):
            if row.done:  # finished or released
                continue
            row.session.cached.extend(chunk)
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.sampling_logprobs.append(sampling)
            self.generated_tokens += 1

    def _collect(self) -> list[Completion]:
        finished = []
        for row in self._batch:
            if row.done or not row.ids:
                continue
            stopped = row.ids[-1] in row.request.stop_ids
            if stopped or len(row.ids) == row.request.max_new_tokens:
                row.done = True
                self._in_flight.discard(row.request.session)
                finished.append(
                    Completion(
                        session=row.request.session,
                        ids=row.ids,
                        logprobs=row.logprobs,
                        stopped=stopped,
                        sampling_logprobs=row.sampling_logprobs,
                    )
                )
        return finished


def _parts(lengths: Sequence[int], *, most: int) -> Iterator[list[int]]:
    """Split chunks of these lengths into parts, each for one forward, padded to its longest. A part
    is split where that saves more than a forward costs, or where it has more than `most` tokens."""
    waiting = [sorted(range(len(lengths)), key=lambda i: -lengths[i])]
    while waiting:
        part = waiting.pop()
        sizes = np.asarray([lengths[i] for i in part])
        # Longest first: a cut before i pads the rest to sizes[i] instead of to sizes[0].
        saved = (sizes[0] - sizes) * np.arange(len(part), 0, -1)
        at = int(saved.argmax())
        if saved[at] <= FORWARD:
            at = max(1, most // int(sizes[0]))
        if at < len(part):
            waiting += [part[at:], part[:at]]
        else:
            yield part


def _sample(
    logits_BV: torch.Tensor, rows: Sequence[_Running]
) -> tuple[list[int], list[float], list[float]]:
    """Draw a token for each row, by its own sampling parameters and its next uniform number, so
    that no row depends on another. Returns tokens, their log-probabilities at temperature 1 over
    the whole vocabulary, and those under the sampling parameters."""
    if not torch.isfinite(logits_BV).all():
        raise FloatingPointError(
            "the student's logits hold NaN or infinity during a rollout: its weights are broken"
            " (lower optimizer.lr, or go back to an earlier checkpoint)"
        )
    logprobs_BV = logits_BV.log_softmax(-1)
    device = logits_BV.device
    params = [row.request.sampling for row in rows]
    if all(sampling.temperature == 0 for sampling in params):  # `_draw` would sort in vain
        tokens_B = logits_BV.argmax(-1)
        sampling_B = torch.zeros_like(logits_BV[:, 0])
    else:
        # min: a finished row that stays in the batch has used its draws up
        draw = [row.draws[min(len(row.ids), len(row.draws) - 1)] for row in rows]
        tokens_B, sampling_B = _draw(
            logits_BV,
            temperature_B=torch.tensor([each.temperature for each in params], device=device),
            top_p_B=torch.tensor([each.top_p for each in params], device=device),
            uniform_B=torch.tensor(np.asarray(draw), device=device),
        )
    behavior_B = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
    return tokens_B.tolist(), behavior_B.tolist(), sampling_B.tolist()


def _draw(
    logits_BV: torch.Tensor,
    *,
    temperature_B: torch.Tensor,
    top_p_B: torch.Tensor,
    uniform_B: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling from the nucleus, the fewest most probable tokens with mass >= top_p:
    the tokens, and their log-probabilities under the sampling parameters (greedy: 0). At
    temperature 1 and top-p 1 these are bit-identical to the policy's own."""
    greedy_B = temperature_B == 0  # divided by 1, so that nothing is infinite; decided by rank 0
    scaled_BV = logits_BV / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    # stable: equal probabilities keep the order of ids, on every device
    probs_BV, order_BV = scaled_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative_BV = probs_BV.cumsum(-1)
    outside_BV = cumulative_BV - probs_BV >= top_p_B[:, None]
    outside_BV[:, 0] = False  # at top_p 0 the nucleus is the most probable token
    mass_B = probs_BV.masked_fill(outside_BV, 0.0).sum(-1)
    rank_B = (cumulative_BV <= (uniform_B * mass_B)[:, None]).sum(-1)
    kept_B = (~outside_BV).sum(-1) - 1
    # minimum: where the sums round below 1, a draw near 1 would land beyond the nucleus
    rank_B = torch.minimum(rank_B, kept_B).masked_fill(greedy_B, 0)
    tokens_B = order_BV.gather(1, rank_B[:, None])[:, 0]
    sampling_B = scaled_BV.log_softmax(-1).gather(1, tokens_B[:, None])[:, 0]
    sampling_B = sampling_B - torch.where(top_p_B < 1, mass_B.log(), 0.0)
    # clamp: a nucleus of one token, whose mass rounds, would have a probability above 1
    return tokens_B, sampling_B.clamp(max=0).masked_fill(greedy_B, 0.0)
