"""Several losses as one: their weighted sum, on the same tokens and scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from tutelage.distill.objectives.needs import union
from tutelage.distill.objectives.tokens import Case, Loss, Rule


class Sum:
    """L = sum_i weight_i L_i.

    Where there are several, each one's diagnostics begin with its name, and `loss/NAME` is its own
    loss, before its weight. A single one keeps its metrics' names.

    Args:
        terms: weight and loss; none twice, since a loss's name tells its metrics apart.
    """

    def __init__(self, terms: Sequence[tuple[float, Rule]]) -> None:
        if not terms:
            raise ValueError("a sum of no objectives: name at least one")
        for weight, rule in terms:
            if not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"{rule.name}: weight={weight}: it must be positive")
        counts = Counter(rule.name for _, rule in terms)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(
                f"objective {twice[0]!r} is there twice: its metrics go by its name: leave one"
            )
        self.terms = tuple(terms)
        self.name = " + ".join(counts)
        self.needs = union({rule.name: rule.needs for _, rule in terms})

    def __call__(self, case: Case) -> Loss:
        losses: list[torch.Tensor] = []
        metrics: dict[str, torch.Tensor] = {}
        for weight, rule in self.terms:
            loss_N, found = rule(case)
            losses.append(weight * loss_N)
            if len(self.terms) > 1:
                found = {f"{rule.name}/{key}": value for key, value in found.items()}
                found[f"loss/{rule.name}"] = loss_N.detach()
            metrics |= found
        return sum(losses[1:], start=losses[0]), metrics
