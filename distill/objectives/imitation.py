"""Imitation: the negative log-likelihood of an expert's tokens, for warm starts and DAgger."""

from __future__ import annotations

from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.tokens import Case, Loss


class Imitation:
    """loss = -beta log pi(y), y an expert's token. On expert episodes this is behaviour cloning; on
    the states that the student itself reaches it is DAgger (Ross et al. 2011, arXiv:1011.0686)."""

    name = "imitation"
    needs = Needs(generated_by="expert", given=True)

    def __init__(self, beta: float = 1.0) -> None:
        if beta <= 0:
            raise ValueError(f"imitation: beta={beta}: it must be positive")
        self.beta = beta

    def __call__(self, case: Case) -> Loss:
        return -self.beta * case.student_logprobs(), {}
