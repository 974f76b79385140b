"""What an objective needs of a teacher's scores, of the rows that it learns from, and of the run.

Each objective says it once. Who routes rows, asks teachers, checks a config or plans a run reads
it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What must be known of each token that takes loss.

    k: how many of the teacher's most probable ids its scores hold; 0: it asks no teacher.
    student_k: at how many of the student's own most probable ids the teacher must be known.
    full: the teacher's whole distribution.
    entropy: the teacher's entropy over the whole vocabulary, which a top K does not tell.
    generated_by: whose tokens the rows hold: the student's, or an expert's.
    given: whether off-policy tokens, which the student did not sample, may be among its own.
    advantage: how much better each token was than expected (`Tokens.advantage_N`).
    draws: whether the loss is a mean over the sampled token, so that the sampling parameters
        matter: policy gradients, the sampled tail, supports that the sampled token joins.
    sampling: log-probabilities under the sampling parameters (`Tokens.sampling_logprobs_N`).
    progress: the share of the run that is done.
    undecided: the share of an update's tokens that counts as undecided, those of highest entropy
        (`Tokens.entropy_floor`); from the share `undecided_from` of the run on.
    """

    k: int = 0
    student_k: int = 0
    full: bool = False
    entropy: bool = False
    generated_by: Literal["student", "expert"] = "student"
    given: bool = False
    advantage: bool = False
    draws: bool = False
    sampling: bool = False
    progress: bool = False
    undecided: float | None = None
    undecided_from: float = 0.0

    @property
    def teacher(self) -> bool:
        """Whether it needs any scores."""
        return self.width > 0 or self.full or self.entropy

    @property
    def width(self) -> int:
        """How many of its own most probable ids a teacher names; never fewer than of the
        student's."""
        return max(self.k, self.student_k)


def union(parts: Mapping[str, Needs]) -> Needs:
    """What several objectives need together. parts: by name.

    Raises:
        ValueError: some learn from the student's tokens, others from an expert's.
    """
    if len({needs.generated_by for needs in parts.values()}) > 1:
        said = [f"{name} learns from the {one.generated_by}'s" for name, one in parts.items()]
        raise ValueError(f"{', '.join(said)} tokens: no row has both: make several tasks of them")
    every = [*parts.values()]
    # The first is the only one: reward_clipped alone has it, and a sum takes no loss twice.
    sharp = next((needs for needs in every if needs.undecided is not None), every[0])
    return Needs(
        # The widest serves all: ids come most probable first, and each loss takes its first k.
        k=max(needs.k for needs in every),
        student_k=max(needs.student_k for needs in every),
        full=any(needs.full for needs in every),
        entropy=any(needs.entropy for needs in every),
        generated_by=every[0].generated_by,
        given=all(needs.given for needs in every),  # one that cannot take them refuses for all
        advantage=any(needs.advantage for needs in every),
        draws=any(needs.draws for needs in every),
        sampling=any(needs.sampling for needs in every),
        progress=any(needs.progress for needs in every),
        undecided=sharp.undecided,
        undecided_from=sharp.undecided_from,
    )
