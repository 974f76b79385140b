"""The transformers rollout engine: many multi-turn sessions in one batch, each with its own cache.

A session owns a slot of one big cache, in which a token's index is its position. So one rule, key
position <= query position, masks padding, ragged lengths, prefill and decoding alike, and only a
turn's new tokens are ever prefilled. Left out: paged memory and batches that mix prefill with
decoding; for those there is vLLM.

Letters: B batch rows, Q query tokens, H key-value heads, P positions in a slot, V vocabulary, D
head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace
from typing import Any

import numpy as np
import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.engines.sampling import Drawn, Laws, draw
from tutelage.distill.models.architecture import context_of, window_of
from tutelage.distill.models.decoders import At
from tutelage.distill.models.student import Student
from tutelage.distill.models.threads import fitting, matrix_size
from tutelage.distill.models.weights import weight_of
from tutelage.envs.errors import one_line
from tutelage.scheduler.engine import Completion, Request, Weights
from tutelage.scheduler.episodes import GREEDY

CHUNK = 256
"""A slot's room grows by at least this many positions."""

FORWARD = 64
"""What a forward costs beside its tokens, in tokens: its operators are called however few there
are."""


class SlotCache:
    """Keys and values of every session, per layer [slots, H, P, D]; a model takes it for its cache.

    `look` says before a forward what its rows and queries are.
    """

    is_compileable = False  # transformers reads it of a cache

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.slots, self.room = 0, 0
        self._rows: slice | torch.Tensor = slice(0)
        self._positions_BQ = torch.empty(0, 0, dtype=torch.long)
        self._reach = 0

    def look(self, rows: slice | torch.Tensor, positions_BQ: torch.Tensor, reach: int) -> None:
        """rows: the rows' slots; those of a slice need no copy. positions_BQ: where the queries'
        tokens go. reach: how many positions they may look at."""
        self._rows, self._positions_BQ, self._reach = rows, positions_BQ, reach

    def reserve(self, slots: int, room: int) -> None:
        """Grow to at least `slots` x `room`; what is stored stays."""
        if slots > self.slots or room > self.room:
            slots = max(slots, self.slots)
            # Growing copies the whole cache: by a quarter of it, so that no token is copied often.
            grown = self.room + max(CHUNK, self.room // 4)
            room = max(room, grown) if room > self.room else self.room
            self.keys = [self._grown(old, slots, room) for old in self.keys]
            self.values = [self._grown(old, slots, room) for old in self.values]
            self.slots, self.room = slots, room

    @staticmethod
    def _grown(old: torch.Tensor, slots: int, room: int) -> torch.Tensor:
        # zeros: the mask keeps probabilities off unwritten positions, but 0 * NaN would be NaN
        new = old.new_zeros(slots, old.shape[1], room, old.shape[3])
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def move(self, source: int, to: int, filled: int) -> None:
        """Copy the first `filled` positions of one slot to another."""
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
        heads, size = new_BHQD.shape[1], new_BHQD.shape[3]
        rows, positions_BQ = self._rows, self._positions_BQ
        if isinstance(rows, slice):  # a view of the cache; indexing by slots, below, copies
            index = positions_BQ[:, None, :, None].expand(-1, heads, -1, size)
            return kept[rows].scatter_(2, index, new_BHQD)[:, :, : self._reach]
        kept[rows[:, None], :, positions_BQ] = new_BHQD.transpose(1, 2)
        return kept[rows, :, : self._reach]

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
            at_BQ = torch.tensor([[t]], device=student.device)
            cache.look(slice(1), at_BQ, t + 1)
            parts.append(
                student.decoder(
                    ids_1T[:, t : t + 1],
                    positions_BT=at_BQ,
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
    # and passes: `draw` names it.
    if apart > 0.1 * float(whole_1TD.abs().max()):
        raise ConfigError(
            f"{who} computes other hidden states token by token than in one piece: it keeps more"
            f" than keys and values: {cure}"
        )


@dataclass(slots=True)
class _Session:
    slot: int
    cached: list[int] = field(default_factory=list)
    """Ids whose keys and values the slot holds; while a reply is made, those of the last one."""


@dataclass(slots=True, eq=False)
class _Running:
    request: Request
    session: _Session
    draws: np.ndarray  # one uniform number for each token that may come
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        return self.ids[-1] in self.request.stop_ids

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.ids) == self.request.max_new_tokens

    @property
    def filled(self) -> int:
        """Positions whose keys and values the slot holds: all but the last token's."""
        return len(self.request.ids) + len(self.ids) - 1


class _Batch:
    """What decodes, as tensors over the first slots: row b is slot b.

    A slot in between whose reply is finished, or that nobody has, is computed in vain: it writes
    where its own next token will go, and nobody reads what it says.
    """

    def __init__(
        self, running: Sequence[_Running], filled: Mapping[int, int], device: torch.device
    ) -> None:
        """filled: by slot, positions that must stay as they are."""
        self.size = len(running)  # those that ran when it was made
        self.rows: list[_Running | None] = [None] * (1 + max(row.session.slot for row in running))
        width = 1 + max(len(row.draws) for row in running)  # one more, for a row that has ended
        draws_BN = np.zeros((len(self.rows), width), dtype=np.float32)
        ids_B1, positions_B1, drawn_B1, steps_B1 = found = np.zeros(
            (4, len(self.rows), 1), dtype=np.int64
        )
        for slot, count in filled.items():
            if slot < len(self.rows):
                positions_B1[slot] = count
        for row in running:
            b = row.session.slot
            self.rows[b], draws_BN[b, : len(row.draws)] = row, row.draws
            ids_B1[b], positions_B1[b], drawn_B1[b] = row.ids[-1], row.filled, len(row.ids)
            steps_B1[b] = 1
        self.ids_B1, self.positions_B1, self._drawn_B1, self._steps_B1 = torch.from_numpy(found).to(
            device
        )
        self._draws_BN = torch.from_numpy(draws_BN).to(device)
        self.laws = Laws.of([r.request.sampling if r else GREEDY for r in self.rows], device)

    @property
    def uniform_B1(self) -> torch.Tensor:
        """Each row's next uniform number."""
        return self._draws_BN.gather(1, self._drawn_B1)

    def advance(self, ids_B1: torch.Tensor) -> None:
        """Go on with these tokens."""
        self.ids_B1 = ids_B1
        self.positions_B1 += self._steps_B1
        self._drawn_B1 += self._steps_B1

    def end(self, row: _Running) -> None:
        """Compute a row in vain from now on."""
        slot = row.session.slot
        if slot < len(self.rows) and self.rows[slot] is row:
            self.rows[slot] = None
            self._steps_B1[slot] = 0


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
        student.decoder.forget()  # until `load` the weights may still change
        self._cache = SlotCache()
        self._sessions: dict[int, _Session] = {}
        self._free: list[int] = []  # a heap
        self._queue: list[Request] = []
        self._running: list[_Running] = []
        self._batch: _Batch | None = None  # None: to be made of the running
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
        self._student.decoder.forget()
        self._sessions.clear()
        self._free = list(range(self._cache.slots))
        self._running.clear()
        self._batch = None
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
            heappush(self._free, owned.slot)
            running = [row for row in self._running if row.session is not owned]
            if len(running) < len(self._running):
                self._running, self._batch = running, None
        self._in_flight.discard(session)
        self._queue = [request for request in self._queue if request.session != session]

    def close(self) -> None:
        """Drop keys and values."""
        self._cache, self._sessions = SlotCache(), {}

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        # Prefill once as many wait as still run: a forward costs about as much for one as for many.
        if self._queue and len(self._queue) >= len(self._running):
            self._prefill()
        elif self._running:
            self._decode()
        return self._collect()

    def _prefill(self) -> None:
        """Feed every queued request's new ids and sample its first token."""
        fresh = [self._admit(request) for request in self._queue]
        self._queue.clear()
        reach = max(len(row.request.ids) + row.request.max_new_tokens for row in fresh)
        self._cache.reserve(self._cache.slots, reach)
        chunks = [row.request.ids[len(row.session.cached) :] for row in fresh]
        self._running += fresh
        self._batch = None
        for part in _parts([len(chunk) for chunk in chunks], most=self._prefill_tokens):
            part.sort(key=lambda i: fresh[i].session.slot)
            self._read([fresh[i] for i in part], [chunks[i] for i in part])

    def _admit(self, request: Request) -> _Running:
        session = self._sessions.get(request.session)
        if session is None:
            if not self._free:
                old = self._cache.slots
                self._cache.reserve(max(8, 2 * old), self._cache.room)
                self._free = list(range(old, self._cache.slots))
            # the lowest slot: what decodes are the first ones
            session = self._sessions[request.session] = _Session(slot=heappop(self._free))
        draws = np.random.default_rng(request.seed).random(request.max_new_tokens, dtype=np.float32)
        return _Running(request, session, draws)

    def _read(self, rows: list[_Running], chunks: list[Sequence[int]]) -> None:
        """One forward over prompts' new ids, the rows in the order of their slots."""
        device = self._student.device
        lengths = np.array([len(chunk) for chunk in chunks])
        past = np.array([len(row.session.cached) for row in rows])
        ids_BQ = np.zeros((len(rows), lengths.max()), dtype=np.int64)
        for i, chunk in enumerate(chunks):
            ids_BQ[i, : len(chunk)] = chunk
        positions = past[:, None] + np.arange(ids_BQ.shape[1])
        self._cache.reserve(self._cache.slots, int(positions.max()) + 1)
        self.prefilled_tokens += int(lengths.sum())
        drawn = self._forward(
            torch.from_numpy(ids_BQ).to(device),
            torch.from_numpy(positions).to(device),
            slots=self._slots(rows),
            reach=int((past + lengths).max()),
            at=(
                torch.arange(len(rows), device=device),
                torch.from_numpy(lengths - 1).to(device),
            ),
            laws=Laws.of([row.request.sampling for row in rows], device),
            uniform_B1=torch.from_numpy(np.stack([row.draws[:1] for row in rows])).to(device),
            opens=not past.any(),
        )
        self._note(rows, drawn)

    def _slots(self, rows: Sequence[_Running]) -> slice | torch.Tensor:
        slots = [row.session.slot for row in rows]
        if slots[-1] - slots[0] < len(slots):
            return slice(slots[0], slots[-1] + 1)
        return torch.tensor(slots, device=self._student.device)

    def _decode(self) -> None:
        """One more token of every row that runs."""
        batch = self._batch = self._batch or self._batched()
        drawn = self._forward(
            batch.ids_B1,
            batch.positions_B1,
            slots=slice(len(batch.rows)),
            reach=1 + max(row.filled for row in self._running),
            at=None,
            laws=batch.laws,
            uniform_B1=batch.uniform_B1,
        )
        batch.advance(drawn.ids_B1)
        self._note(batch.rows, drawn)

    def _batched(self) -> _Batch:
        """Moves the running down where slots are free: all up to the last one are computed."""
        for row in sorted(self._running, key=lambda row: -row.session.slot):
            slot = row.session.slot
            if not self._free or self._free[0] > slot:
                break
            row.session.slot = heapreplace(self._free, slot)
            self._cache.move(slot, row.session.slot, row.filled)
        filled = {session.slot: len(session.cached) for session in self._sessions.values()}
        return _Batch(self._running, filled, self._student.device)

    def _forward(
        self,
        ids_BQ: torch.Tensor,
        positions_BQ: torch.Tensor,
        *,
        slots: slice | torch.Tensor,
        reach: int,
        at: At | None,
        laws: Laws,
        uniform_B1: torch.Tensor,
        opens: bool = False,
    ) -> Drawn:
        """Feed these ids at these positions; draw what follows the token `at` of each row (None:
        its only one). opens: these are all of every row's ids, from position 0."""
        self._cache.look(slots, positions_BQ, reach)
        mask_B1QP = None  # a row up to itself: a mask would have the square of a prompt's length
        if not opens:
            looked_P = torch.arange(reach, device=ids_BQ.device)
            mask_B1QP = looked_P <= positions_BQ[:, None, :, None]
        with fitting(self._matrix_size, ids_BQ.numel()):
            hidden = self._student.decoder(
                ids_BQ,
                positions_BT=positions_BQ,
                mask_B1TP=mask_B1QP,
                cache=self._cache,
                at=at,
            )
            last_BD = hidden[:, 0] if at is None else hidden
            return draw(self._student.logits(last_BD).float(), laws, uniform_B1)

    def _note(self, rows: Sequence[_Running | None], drawn: Drawn) -> None:
        """Give each row that runs its token."""
        said = zip(rows, drawn.ids, drawn.logprobs, drawn.sampling_logprobs, strict=True)
        for row, token, logprob, sampling in said:
            if row is not None:
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.sampling_logprobs.append(sampling)
                self.generated_tokens += 1

    def _collect(self) -> list[Completion]:
        finished = [row for row in self._running if row.ended]
        for row in finished:
            self._end(row)
            row.session.cached = [*row.request.ids, *row.ids[:-1]]  # the last one was not fed
            self._in_flight.discard(row.request.session)
        return [
            Completion(
                session=row.request.session,
                ids=row.ids,
                logprobs=row.logprobs,
                stopped=row.stopped,
                sampling_logprobs=row.sampling_logprobs,
            )
            for row in finished
        ]

    def _end(self, row: _Running) -> None:
        self._running.remove(row)
        if self._batch is not None:
            self._batch.end(row)
            # Moving a slot costs about as much as a few steps that compute it in vain.
            if 4 * len(self._running) <= 3 * self._batch.size:
                self._batch = None


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
