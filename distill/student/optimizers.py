"""The student's optimizer: AdamW, or Muon for the hidden matrices beside AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tutelage.distill.config.sections import OptimizerConfig
from tutelage.distill.models.student import Student
from tutelage.distill.student.muon import Muon, Orthogonalize, orthogonalized


class Optimizer:
    """One or two torch optimizers that step together at one learning rate.

    Weight decay falls on matrices alone: on norms and biases it would only shrink them. Muon
    takes the hidden matrices, its update scaled to AdamW's size; embeddings, head, norms and biases
    stay with AdamW.

    Args:
        orthogonalize: see `Muon`.
    """

    def __init__(
        self,
        student: Student,
        config: OptimizerConfig,
        orthogonalize: Orthogonalize = orthogonalized,
    ) -> None:
        self.parameters = student.trainable()
        # by id: tensors compare elementwise, so `in` on a list of them would not work
        hidden = {id(p) for p in student.hidden_matrices()} if config.name == "muon" else set()
        by_muon = [p for p in self.parameters if id(p) in hidden]
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in matrices if id(p) not in hidden]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                groups,
                lr=config.lr,
                betas=config.betas,
                weight_decay=config.weight_decay,
                # None is torch's choice, which on a CPU is a dozen passes over the weights, not one
                fused=True if student.device.type == "cpu" else None,
            )
        ]
        if by_muon:
            self._parts.append(
                Muon(
                    by_muon,
                    lr=config.lr,
                    weight_decay=config.weight_decay,
                    orthogonalize=orthogonalize,
                )
            )

    def step(self, lr: float) -> None:
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes back."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether a saved state is of the same optimizers over equally many parameters."""
        saved = [
            [len(group["params"]) for group in part["param_groups"]] for part in state["parts"]
        ]
        own = [[len(group["params"]) for group in part.param_groups] for part in self._parts]
        return saved == own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state, but keep this config's rates, betas and decays."""
        # torch's load_state_dict overwrites them with the saved ones: a run that resumes with
        # another lr would train at the old one.
        for part, saved in zip(self._parts, state["parts"], strict=True):
            settings = [
                {key: value for key, value in group.items() if key != "params"}
                for group in part.param_groups
            ]
            part.load_state_dict(saved)
            for group, own in zip(part.param_groups, settings, strict=True):
                group.update(own)
