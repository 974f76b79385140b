"""The records that travel between processes: orders, episodes, failures. No torch, no Ray.

Letters of shape suffixes: T tokens of a row, N tokens that take loss, K support size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

NO_ACTION = -1
"""The turn number of a token that is no action: prompt, observation, template."""


Ending = Literal["terminated", "truncated", "max_turns", "context"]
"""What ended an episode: the environment (terminated, truncated), or a limit of the rollout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How action tokens are drawn. temperature: 0 is greedy. top_p: cuts the tail, renormalises."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: it must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: it must be in (0, 1]")

    @property
    def whole(self) -> bool:
        """Whether tokens are drawn from the policy itself, unchanged."""
        return self.temperature == 1 and self.top_p == 1


GREEDY = SamplingParams(temperature=0.0)


def _unsaid() -> npt.NDArray[np.float32]:
    return np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training row: the exact ids that a model read and wrote.

    ids_T: token ids, int32. turns_T: the turn of an action token, NO_ACTION elsewhere.
    behavior_logprobs_T: the student's natural log-probability of a token it sampled, over the full
    vocabulary at temperature 1; NaN where the student sampled nothing (a stored 0.0 would look like
    certainty).
    sampling_logprobs_T: the same token's log-probability under the sampling parameters that drew
    it, after temperature and top-p (greedy: 0); NaN where nothing was sampled or the engine does
    not know it. Of length 0 in a row of an older version, which did not keep it.
    advantage_T: how much better an action token was than expected, by a reward; elsewhere it has no
    meaning. None: there is no reward.
    branches_T: 0 on the trunk. A token of branch b > 0 (an expert's action in a state where the
    student acted otherwise) attends to the trunk before it and to its own branch; no other token
    attends to it.
    """

    ids_T: npt.NDArray[np.int32]
    turns_T: npt.NDArray[np.int32]
    behavior_logprobs_T: npt.NDArray[np.float32]
    branches_T: npt.NDArray[np.int32]
    sampling_logprobs_T: npt.NDArray[np.float32] = field(default_factory=_unsaid)
    advantage_T: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        lengths = {
            len(self.ids_T),
            len(self.turns_T),
            len(self.behavior_logprobs_T),
            len(self.branches_T),
        }
        if len(self.sampling_logprobs_T):
            lengths.add(len(self.sampling_logprobs_T))
        if self.advantage_T is not None:
            lengths.add(len(self.advantage_T))
        if len(lengths) != 1:
            raise ValueError(f"a row's fields differ in length: {sorted(lengths)}")
        if len(self.ids_T) and self.turns_T[0] != NO_ACTION:
            raise ValueError("a row must begin with a prompt: nothing predicts its first token")
        if (
            self.advantage_T is not None
            and not np.isfinite(self.advantage_T[self.action_mask_T]).all()
        ):
            raise ValueError("a row's advantages must be finite on its action tokens")

    @property
    def action_mask_T(self) -> npt.NDArray[np.bool_]:
        """True on the tokens that take loss before the special-token mask."""
        return self.turns_T != NO_ACTION

    @property
    def sampling_T(self) -> npt.NDArray[np.float32]:
        """`sampling_logprobs_T`; all NaN in a row of an older version."""
        said = self.sampling_logprobs_T
        return said if len(said) else np.full(len(self.ids_T), np.nan, dtype=np.float32)

    def positions_T(self) -> npt.NDArray[np.int64]:
        """Position ids. The trunk is numbered as if there were no branches; a branch continues from
        where it leaves the trunk."""
        if not self.branches_T.any():
            return np.arange(len(self.ids_T), dtype=np.int64)
        on_trunk_T = self.branches_T == 0
        before_T = np.cumsum(on_trunk_T) - on_trunk_T  # trunk tokens before each token
        since_T = np.zeros(len(self.ids_T), dtype=np.int64)
        run = 0
        for t, branch in enumerate(self.branches_T):
            # At t = 0 the index -1 would be the last token, but a row begins on the trunk.
            run = 0 if branch == 0 else (run + 1 if branch == self.branches_T[t - 1] else 0)
            since_T[t] = run
        return before_T + since_T

    def sources_T(self) -> npt.NDArray[np.int64]:
        """For each token, the index of the one whose hidden state predicts it (the first: -1)."""
        sources_T = np.arange(len(self.ids_T), dtype=np.int64) - 1
        if not self.branches_T.any():
            return sources_T
        # A branch's first token, and the trunk's first after a branch, follow the trunk's last one.
        last_trunk = -1
        for t, branch in enumerate(self.branches_T):
            same = t > 0 and branch != 0 and branch == self.branches_T[t - 1]
            if not same:
                sources_T[t] = last_trunk
            if branch == 0:
                last_trunk = t
        return sources_T


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One episode to play. All randomness in it follows from `seed`; messages call it `name`."""

    task: str
    number: int  # its place in the step's batch
    seed: int
    index: int  # which game or problem: the environment's options["index"]
    teacher: str | None = None  # who scores it
    actor: Literal["student", "expert"] = "student"
    labels: bool = False  # also record the expert's action in every state
    guide: float = 0.0  # share of the episode's length, 0 to 1, that its guide plays first

    @property
    def name(self) -> str:
        return f"{self.task}[{self.index}] seed {self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One exchange as text, for people and reports; training uses the rows. action: the whole
    reply, thoughts included."""

    observation: str
    action: str
    expert_action: str | None = None
    complete: bool = True  # False: the length limit cut the action off
    valid: bool = True  # False: the reply does not keep to the context's format


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A finished episode. Its order travels with it, so that no index can mix up its teacher."""

    order: Order
    rows: tuple[Row, ...]
    turns: tuple[Turn, ...]
    success: bool
    reward: float
    task_type: str
    ended: Ending
    sampling: SamplingParams
    version: int  # of the student's weights
    attempts: int = 1
    final_observation: str = ""
    verdict: str = ""  # info["reason"], where the environment says why it gave its reward

    @property
    def num_action_tokens(self) -> int:
        """Tokens that take loss, before the special-token mask."""
        return int(sum(row.action_mask_T.sum() for row in self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """An episode that no attempt could play to its end: counted and named, not fatal."""

    order: Order
    reason: Literal["died", "timeout", "raised", "garbage", "undecided", "too long"]
    detail: str
    attempts: int

    @property
    def name(self) -> str:
        """The order, the reason and the detail's last line: of a traceback, the one that names the
        error."""
        last = (self.detail.strip().splitlines() or [""])[-1]
        return f"{self.order.name}: {self.reason}: {last[:200]}"

    @property
    def why(self) -> str:
        """The reason as a sentence's end."""
        environments = self.reason in ("died", "timeout", "raised", "garbage")
        return f"its environment {self.reason}: {self.detail}" if environments else self.detail


_SAVED = {
    "behavior_logprobs_T": "logprobs_T",
    "sampling_logprobs_T": "law_logprobs_T",
    "sampling": "law",
}
"""Names of fields in checkpoints: runs of older versions have these, and must resume."""


def saved(outcome: Episode | Dropped) -> dict[str, Any]:
    """An outcome as a checkpoint stores it: plain data and arrays."""
    plain = _renamed(asdict(outcome), _SAVED)
    if "rows" in plain:
        plain["rows"] = tuple(_renamed(row, _SAVED) for row in plain["rows"])
    return plain


def revived(saved: Mapping[str, Any]) -> Episode | Dropped:
    """The outcome that `saved` took apart; arrays may have become CPU tensors."""
    names = {old: name for name, old in _SAVED.items()}
    plain = _renamed(saved, names)
    order = Order(**plain["order"])
    if "reason" in plain:  # only Dropped has one
        return Dropped(**{**plain, "order": order})
    rows = tuple(
        # None is a row without advantages: as an array it would be one of objects.
        Row(**{k: np.asarray(v) for k, v in _renamed(row, names).items() if v is not None})
        for row in plain["rows"]
    )
    turns = tuple(Turn(**turn) for turn in plain["turns"])
    sampling = SamplingParams(**plain["sampling"])
    return Episode(**{**plain, "order": order, "rows": rows, "turns": turns, "sampling": sampling})


def _renamed(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in fields.items()}
