"""TrOPD: the sampled token's reward where the teacher would accept it, another rule elsewhere."""

from __future__ import annotations

import torch

from tutelage.distill.objectives.divergences import check_k, forward_kl
from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.policy_gradient import weighted
from tutelage.distill.objectives.tokens import Case, Loss, check_behavior
from tutelage.envs.names import unknown

OUTLIERS = ("forward_kl", "mask", "clip", "forward_kl_pg")
TRUSTS = ("ratio", "static")


class TrustRegion:
    """Trust-region on-policy distillation (TrOPD, arXiv:2606.01249, section 3). With pi_old the
    behavior policy and R = log q(y) - log pi_old(y), detached:

        M ~ Bernoulli(min(q(y) / pi_old(y), 1))        speculative decoding's acceptance
        trusted token:  -R rho,  rho = pi(y) / pi_old(y)          reverse KL, as a policy gradient
        outlier:        sum_{TopK q} q log(q / pi)                forward KL, direct
        token of a teacher's prefix:  -beta log pi(y)             forward KL, K1

    Differentiating log(pi/q) of a sampled token directly would have expectation zero; hence the
    policy gradient. M is drawn once per token, against the policy that sampled it. The top K are
    not renormalised (the paper's formula).

    Args:
        k: the teacher's support, where an outlier's rule uses one.
        outlier: forward_kl (the paper's); mask (0); clip (-max(R, tau) rho); forward_kl_pg (the
            official code's reading: minus the forward KL as the sampled token's advantage).
        trust: ratio (M above), or static, as in the paper's plain rows: trusted where R > tau.
        tau: log-ratio, for trust=static and outlier=clip; the paper gives no value.
        beta: of the prefix's tokens.
        behavior: see `Case.importance`; sampling weighs trusted and outlying tokens alike, and M
            is drawn as above.
    """

    name = "trust_region"

    def __init__(
        self,
        # k and beta: the paper's.
        k: int = 64,
        outlier: str = "forward_kl",
        trust: str = "ratio",
        tau: float | None = None,
        beta: float = 0.001,
        behavior: str = "full",
    ) -> None:
        check_behavior(self.name, behavior)
        if outlier not in OUTLIERS:
            raise ValueError(unknown("trust_region outlier", outlier, OUTLIERS))
        if trust not in TRUSTS:
            raise ValueError(unknown("trust_region trust", trust, TRUSTS))
        if tau is None and (trust == "static" or outlier == "clip"):
            raise ValueError(
                f"trust_region: trust={trust!r} with outlier={outlier!r} needs tau, a log-ratio"
                " such as -2.0 (the paper gives no value)"
            )
        check_k(self.name, k)
        if beta < 0:
            raise ValueError(f"trust_region: beta={beta}: it must not be negative")
        self.k, self.outlier, self.trust, self.beta = k, outlier, trust, beta
        self.tau, self.behavior = tau, behavior
        self.needs = Needs(k=k, given=True, draws=True, sampling=behavior == "sampling")

    def __call__(self, case: Case) -> Loss:
        given_N = case.behavior_logprobs_N.isnan()
        logprobs_N = case.student_logprobs()
        # A prefix's token has no pi_old (NaN): a finite stand-in, since torch.where would let a NaN
        # of the branch that it does not take through to the gradient.
        old_N = torch.where(given_N, logprobs_N.detach(), case.behavior_logprobs_N)
        reward_N = (case.teacher_logprobs() - old_N).detach()
        if self.trust == "ratio":
            # exp R is q / pi_old; draws are below 1, so that equal policies trust every token.
            trusted_N = case.uniforms() < reward_N.exp().clamp(max=1)
        else:
            assert self.tau is not None
            trusted_N = reward_N > self.tau
        ratio_N = (logprobs_N - old_N).exp()
        loss_N = torch.where(trusted_N, -reward_N * ratio_N, self._outlier(case, reward_N, ratio_N))
        loss_N = torch.where(given_N, -self.beta * logprobs_N, loss_N)
        trusted_N = trusted_N & ~given_N  # M does not apply to a prefix's tokens
        metrics = {"trust/share": trusted_N.float(), "trust/given": given_N.float()}
        return weighted(loss_N, metrics, case.importance(self.behavior))

    def _outlier(self, case: Case, reward_N: torch.Tensor, ratio_N: torch.Tensor) -> torch.Tensor:
        if self.outlier == "mask":
            return torch.zeros_like(reward_N)
        if self.outlier == "clip":
            # The paper's text has log(pi / q) in this rule, a slip: its Table 1 has log(q / pi).
            return -reward_N.clamp(min=self.tau) * ratio_N
        forward_N = forward_kl(case, self.k)
        if self.outlier == "forward_kl":
            return forward_N
        return forward_N.detach() * ratio_N  # -A rho, with A = -KL detached
