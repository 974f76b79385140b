"""Local support matching: the KL divergence restricted to a small set of tokens per position."""

from __future__ import annotations

import torch

from tutelage.distill.objectives.divergences import check_direction, check_k, divergence
from tutelage.distill.objectives.needs import Needs
from tutelage.distill.objectives.tokens import IMPOSSIBLE, Case, Loss, check_behavior
from tutelage.envs.names import unknown

SUPPORTS = ("teacher", "student", "teacher+sampled", "student+sampled")


class LocalSupport:
    """KL on a support S of K tokens per position, both sides renormalised there (Revisiting-OPD,
    arXiv:2603.25562, "Ours", which is support=teacher, direction=reverse):

        S(c) = TopK_q(c);  pi^(v) = pi(v) / sum_S pi,  q^(v) = q(v) / sum_S q
        reverse: sum_S pi^ log( pi^ / q^ )        seeks the teacher's modes
        forward: sum_S q^ log( q^ / pi^ )         covers them: it pulls up what the student neglects
        jsd:     half of each against m = (q^ + pi^) / 2 (generalised JSD of GKD, beta = 0.5)

    A direct, differentiable loss: the gradient flows through both pi^ of the formula, the teacher
    is constant, and logits outside S get no gradient. The normaliser over the vocabulary cancels,
    so only K logits per position are needed.

    Without renormalisation the sum is no divergence: reverse has its minimum where 63 % of the
    student's mass has left S (the paper's collapse, section 3.2). Adding one term for the sampled
    token y, a tail, repairs it (EMA-PG, arXiv:2602.04417; variants V4 and V5 of the paper's Table
    4); pi_old is the behavior policy:

        sum_S pi log( pi / q ) + 1[y not in S] s rho log( pi(y) / q(y) ),
        rho = pi(y) / sg pi(y),  s = sg( pi(y) / pi_old(y) )

    Its value and its gradient are, in the mean over y ~ pi, those of the full reverse KL. The
    logarithm is differentiated too: with sg( log(pi/q) ), as some write the formula, the mean
    gradient would be off by the gradient of the mass pi(S).

    Args:
        k: the support's size.
        support: whose top K, and whether y joins it (where it is not in it already).
        renormalize: False: full-vocabulary probabilities on S.
        direction: reverse (the paper's), forward or jsd.
        tail: "sampled" adds the tail above; needs reverse, renormalize=False, and y not in S.
        mass: adaptive support: only the teacher's fewest tokens with this mass, at most K (the
            authors' future work). None: all K.
        importance_clip: the largest s; None: e^20, as in the authors' code.
        behavior: see `Case.importance`; only the tail and '+sampled' depend on the sampled token.
            sampling: s is pi / mu, and a support that y joins is taken as
            L_S + w (L_{S+y} - L_S), whose mean is that over y ~ pi_old except for the tokens that
            mu cuts off.
    """

    name = "local_support"

    def __init__(
        self,
        # The paper's K, compared with 16 and 48 (section 3.2): a small one is less stable.
        k: int = 32,
        support: str = "teacher",
        renormalize: bool = True,
        direction: str = "reverse",
        tail: bool | str = False,
        mass: float | None = None,
        importance_clip: float | None = None,
        behavior: str = "full",
    ) -> None:
        check_behavior(self.name, behavior)
        check_direction(self.name, direction)
        if support not in SUPPORTS:
            raise ValueError(unknown("local_support support", support, SUPPORTS))
        check_k(self.name, k)
        if tail not in (False, "sampled"):
            raise ValueError(f"local_support: tail={tail!r}: it must be false or 'sampled'")
        self.by, _, sampled = support.partition("+")
        self.with_sampled = bool(sampled)
        if tail and (renormalize or direction != "reverse" or self.with_sampled):
            raise ValueError(
                "local_support: tail='sampled' completes the unnormalised reverse KL: it needs"
                f" renormalize=False (got {renormalize}), direction='reverse' (got {direction!r})"
                f" and a support without '+sampled' (got {support!r})"
            )
        if mass is not None and not (0 < mass <= 1 and self.by == "teacher"):
            raise ValueError(
                f"local_support: mass={mass} with support={support!r}: it must be in (0, 1], of a"
                " teacher's support"
            )
        if importance_clip is not None and importance_clip <= 0:
            raise ValueError(
                f"local_support: importance_clip={importance_clip}: it must be positive, or null"
            )
        self.k = k
        self.renormalize, self.direction, self.tail = renormalize, direction, bool(tail)
        self.mass, self.importance_clip = mass, importance_clip
        draws = self.tail or self.with_sampled
        # Other supports do not look at the sampled token, so they need no sampling log-probability.
        self.behavior = behavior if draws else "full"
        self.needs = Needs(
            k=k if self.by == "teacher" else 1,  # scores hold at least one id
            student_k=k if self.by == "student" else 0,
            draws=draws,
            sampling=self.behavior == "sampling",
        )

    def __call__(self, case: Case) -> Loss:
        ids_NK, teacher_NK, kept_NK = self._support(case)
        inside_N = ((ids_NK == case.ids_N[:, None]) & kept_NK).any(-1)
        mass_N = torch.where(kept_NK, teacher_NK.exp(), 0.0).sum(-1)
        weight_N = case.importance(self.behavior)
        bare_NK = kept_NK  # the support without the sampled token
        if self.with_sampled:
            # A column of its own; masked where y is in S already, or it would count twice.
            ids_NK = torch.cat([ids_NK, case.ids_N[:, None]], -1)
            teacher_NK = torch.cat([teacher_NK, case.teacher_logprobs()[:, None]], -1)
            bare_NK = torch.cat([kept_NK, torch.zeros_like(inside_N)[:, None]], -1)
            kept_NK = torch.cat([kept_NK, ~inside_N[:, None]], -1)
        # Renormalised, a softmax over S needs no normaliser over V: raw logits are enough.
        at = case.student.logits_at if self.renormalize else case.student.logprobs_at
        student_NK = at(ids_NK)
        loss_N = self._divergence(student_NK, teacher_NK, kept_NK)
        metrics = {
            "support/teacher_mass": mass_N,
            "support/sampled_outside": (~inside_N).float(),
            "support/size": kept_NK.sum(-1).float(),
        }
        if self.with_sampled and weight_N is not None:
            bare_N = self._divergence(student_NK, teacher_NK, bare_NK)
            loss_N = bare_N + weight_N * (loss_N - bare_N)
        if self.tail:
            loss_N = loss_N + torch.where(inside_N, 0.0, self._tail(case, weight_N))
        if weight_N is not None:
            metrics["behavior/weight"] = weight_N
        return loss_N, metrics

    def _divergence(
        self, student_NK: torch.Tensor, teacher_NK: torch.Tensor, kept_NK: torch.Tensor
    ) -> torch.Tensor:
        """On those columns that are kept [N]."""
        # IMPOSSIBLE on both sides: such a column adds 0 to the sum, and -inf would make it NaN.
        student_NK = student_NK.masked_fill(~kept_NK, IMPOSSIBLE)
        teacher_NK = teacher_NK.masked_fill(~kept_NK, IMPOSSIBLE)
        if self.renormalize:
            student_NK, teacher_NK = student_NK.log_softmax(-1), teacher_NK.log_softmax(-1)
        return divergence(student_NK, teacher_NK, direction=self.direction)

    def _support(self, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, the teacher's log-probabilities there, which of them count) [N, K] each."""
        scores = case.teacher
        if self.by == "student":
            ids_NK, teacher_NK = scores.at_student(case.student, self.k)
        else:
            ids_NK, teacher_NK = scores.ids_NK[:, : self.k], scores.logprobs_NK[:, : self.k]
        kept_NK = torch.ones_like(ids_NK, dtype=torch.bool)
        if self.mass is not None:
            probs_NK = teacher_NK.exp()
            # The mass before an id, not with it: so the id that crosses the bound is kept.
            kept_NK = probs_NK.cumsum(-1) - probs_NK < self.mass
        return ids_NK, teacher_NK.clamp(min=IMPOSSIBLE), kept_NK

    def _tail(self, case: Case, drawn_N: torch.Tensor | None) -> torch.Tensor:
        logprobs_N = case.student_logprobs()
        # s of the formula; the bounds are those of the authors' code
        weight_N = (logprobs_N.detach() - case.behavior_logprobs_N).clamp(-20, 20).exp()
        if drawn_N is not None:
            weight_N = weight_N * drawn_N
        if self.importance_clip is not None:
            weight_N = weight_N.clamp(max=self.importance_clip)
        rho_N = (logprobs_N - logprobs_N.detach()).exp()  # 1, with the gradient of log pi
        return weight_N * rho_N * (logprobs_N - case.teacher_logprobs())
