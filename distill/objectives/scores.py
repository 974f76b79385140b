"""A teacher's scores of N tokens: its top-K ids with log-probabilities, and the sampled token's.

Letters: N tokens, K support size, J query ids a token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Any

import torch

from tutelage.distill.objectives.largest import top_k
from tutelage.distill.objectives.students import StudentView

CHUNK = 1 << 25
"""Elements of a [tokens, vocabulary] block that exist at once: 128 MB in float32."""

FINITE = -1e4
"""A log-probability of which float32's and float64's exponential is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """Scores of N tokens, natural logs over the full vocabulary at temperature 1.

    ids_NK: int64, the teacher's K most probable ids, most probable first; ties in no order.
    logprobs_NK, sampled_N: float32. -inf is allowed (probability zero); NaN and +inf are not.
    vocabulary: V, the number of ids that take probability.
    entropy_N: nats, over the whole vocabulary; None from a server that does not tell it.
    query_ids_NJ, query_logprobs_NJ: ids at which the student wants the teacher's log-probabilities
    (the student's own top J), and these.
    full_NV: every log-probability, where the teacher's logits are here (`from_logits`) or it was
    asked for all.
    checked: these are parts of scores whose values were checked when they arrived (from logits, or
    in a message): only shapes are checked. On a GPU each check of values waits for the device.

    Raises:
        ValueError: shapes that do not fit, ids outside the vocabulary, NaN or +inf.
    """

    ids_NK: torch.Tensor
    logprobs_NK: torch.Tensor
    sampled_N: torch.Tensor
    vocabulary: int
    entropy_N: torch.Tensor | None = None
    query_ids_NJ: torch.Tensor | None = None
    query_logprobs_NJ: torch.Tensor | None = None
    full_NV: torch.Tensor | None = None
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        if self.ids_NK.shape != self.logprobs_NK.shape or self.ids_NK.shape[0] != len(self):
            raise ValueError(
                f"teacher scores differ in shape: ids {tuple(self.ids_NK.shape)}, log-probabilities"
                f" {tuple(self.logprobs_NK.shape)}, sampled {tuple(self.sampled_N.shape)}"
            )
        queries = (self.query_ids_NJ, self.query_logprobs_NJ)
        if len({None if tensor is None else tensor.shape for tensor in queries}) > 1:
            raise ValueError(
                "teacher scores at query ids: the ids and the log-probabilities must come together,"
                " in one shape"
            )
        if self.full_NV is not None and self.full_NV.shape[1] != self.vocabulary:
            raise ValueError(
                f"teacher full_NV has {self.full_NV.shape[1]} columns for a vocabulary of"
                f" {self.vocabulary}"
            )
        parts, count = self.tensors(), len(self)
        for name, tensor in parts:
            if tensor.shape[0] != count:
                raise ValueError(f"teacher {name} is of {len(tensor)} tokens, not {count}")
        if not checked:
            _check_values(parts, self.vocabulary)

    def __len__(self) -> int:
        return self.sampled_N.shape[0]  # torch's `len` takes five times as long

    def full(self) -> torch.Tensor:
        """Every log-probability [N, V].

        Raises:
            ValueError: these scores hold the top K alone.
        """
        if self.full_NV is None:
            raise ValueError(
                "these teacher scores hold the top"
                f" {self.ids_NK.shape[1]} of {self.vocabulary} log-probabilities, and the objective"
                " needs all of them: score with a teacher in this system's own engine (engine:"
                " transformers), or choose an objective on the teacher's support"
            )
        return self.full_NV

    def entropy(self) -> torch.Tensor:
        """The teacher's entropy in nats [N].

        Raises:
            ValueError: these scores hold none.
        """
        if self.entropy_N is None:
            raise ValueError(
                "these teacher scores hold no entropy, and the objective needs it: score with a"
                " teacher in this system's own engine (engine: transformers)"
            )
        return self.entropy_N

    def at_student(self, student: StudentView, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(the student's own K most probable ids, the teacher's log-probabilities there) [N, K].

        Raises:
            ValueError: the teacher was not asked for them and its whole distribution is not here.
        """
        if self.query_ids_NJ is not None:
            assert self.query_logprobs_NJ is not None
            if self.query_ids_NJ.shape[1] < k:
                raise ValueError(
                    f"k={k}, but the teacher was asked at {self.query_ids_NJ.shape[1]} ids a token"
                )
            return self.query_ids_NJ[:, :k], self.query_logprobs_NJ[:, :k]
        if self.full_NV is None:
            raise ValueError(
                "these teacher scores hold the teacher's own top"
                f" {self.ids_NK.shape[1]} ids, and a student's support needs the teacher at the"
                " student's ids: score with a teacher in this system's own engine (engine:"
                " transformers), or choose support='teacher'"
            )
        ids_NK = student.top_k(k)
        return ids_NK, self.full_NV.gather(1, ids_NK)

    @classmethod
    def from_logits(
        cls,
        logits_NV: torch.Tensor,
        sampled_ids_N: torch.Tensor,
        *,
        k: int,
        keep_full: bool = True,
        query_ids_NJ: torch.Tensor | None = None,
    ) -> TeacherScores:
        """Scores from the teacher's logits. `keep_full=False` drops the whole distribution, which
        student supports and full-vocabulary divergences need; `query_ids_NJ` keeps part of it.

        Raises:
            ValueError: k outside 1..V, or logits that are NaN or +inf.
        """
        vocabulary = logits_NV.shape[-1]
        if not 1 <= k <= vocabulary:
            raise ValueError(f"k={k}: it must be between 1 and the vocabulary's {vocabulary} ids")
        # float32: in bfloat16 a log-probability has two digits, and a KL is a difference of them
        full_NV = logits_NV.detach().float().log_softmax(-1)
        logprobs_NK, ids_NK = top_k(full_NV, k)
        return cls(
            ids_NK=ids_NK,
            logprobs_NK=logprobs_NK,
            sampled_N=full_NV.gather(1, sampled_ids_N[:, None].long())[:, 0],
            vocabulary=vocabulary,
            # 0 log 0 is 0; computed as 0 * -inf it would be NaN
            entropy_N=-full_NV.exp().mul_(full_NV.clamp(min=FINITE)).sum(-1),
            query_ids_NJ=query_ids_NJ,
            query_logprobs_NJ=None if query_ids_NJ is None else full_NV.gather(1, query_ids_NJ),
            full_NV=full_NV if keep_full else None,
        )

    @classmethod
    def join(cls, parts: Sequence[TeacherScores]) -> TeacherScores:
        """Several scores as one, in order. What one of them lacks, the whole lacks."""
        # An optional field stays only where every part has it: a loss that needs it then refuses.
        have = set.intersection(*({name for name, _ in part.tensors()} for part in parts))
        return cls(
            checked=True,
            vocabulary=parts[0].vocabulary,
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in have},
        )

    def to(self, device: torch.device | str) -> TeacherScores:
        """The same scores on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def take(self, index: torch.Tensor) -> TeacherScores:
        """The scores at `index` (a mask or positions along N)."""
        return self._mapped(lambda tensor: tensor[index])

    def split(self, counts: Sequence[int]) -> list[TeacherScores]:
        """The scores of rows that have so many tokens each; they share this one's memory."""
        parts = {name: tensor.split([*counts]) for name, tensor in self.tensors()}
        return [
            replace(self, checked=True, **{name: part[i] for name, part in parts.items()})
            for i in range(len(counts))
        ]

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TeacherScores:
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors()}
        return replace(self, checked=True, **changed)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The fields that are there, by name."""
        found = [(name, getattr(self, name)) for name in self.__slots__]
        return [(name, value) for name, value in found if isinstance(value, torch.Tensor)]


def _check_values(parts: Sequence[tuple[str, torch.Tensor]], vocabulary: int) -> None:
    """Raises ValueError for ids outside the vocabulary, NaN and +inf."""
    for name, tensor in parts:
        if not tensor.numel():  # it has no largest element
            continue
        if name.partition("_N")[0].endswith("ids"):
            if tensor.max() >= vocabulary or tensor.min() < 0:
                raise ValueError(
                    f"teacher {name}: a support id lies outside the vocabulary of {vocabulary}: the"
                    " teacher's tokenizer or its padded embedding differs from the student's"
                )
        elif not tensor.max() < torch.inf:  # `not <` also catches NaN, which max() passes on
            where = (~(tensor < torch.inf)).nonzero()[0].tolist()
            raise ValueError(
                f"teacher {name} at {where} is {tensor[tuple(where)].item()}: a log-probability is"
                " at most 0 or -inf; check the teacher's weights (tutelage eval on its own task)"
                " and its dtype"
            )
