"""The divergence over every token of the vocabulary: exact, at a cost that grows with it."""

from __future__ import annotations

from functools import partial

from tutelage.distill.objectives.divergences import check_direction, divergence
from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.tokens import IMPOSSIBLE, Case, Loss


class FullVocabulary:
    """KL or generalised Jensen-Shannon divergence over the whole vocabulary, direct (GKD, Agarwal
    et al. 2023, arXiv:2306.13649; L_full of Revisiting-OPD, section 2):

        reverse: sum_V pi log(pi / q)      forward: sum_V q log(q / pi)
        jsd: beta KL(q || m) + (1 - beta) KL(pi || m),  m = beta q + (1 - beta) pi

    The teacher sends every log-probability, 4 V bytes a token: this is for small vocabularies and
    for studies; `local_support` scales.

    Args:
        beta: of jsd; its limits are TRL's: 0 is forward, 1 is reverse.
    """

    name = "full_vocabulary"
    # k=1 although no support is used: scores hold at least one id
    needs = Needs(k=1, full=True)

    def __init__(self, direction: str = "reverse", beta: float = 0.5) -> None:
        check_direction(self.name, direction)
        if not 0 <= beta <= 1:
            raise ValueError(f"full_vocabulary: beta={beta}: it must be between 0 and 1")
        self.direction, self.beta = direction, beta

    def __call__(self, case: Case) -> Loss:
        teacher_NV = case.teacher.full().clamp(min=IMPOSSIBLE)
        measure = partial(divergence, direction=self.direction, beta=self.beta)
        return case.student.over_vocabulary(measure, teacher_NV), {}
