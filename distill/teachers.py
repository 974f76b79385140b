"""Teachers score what the student said, in one batched forward; they never speak themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tutelage.distill.batches import pack
from tutelage.distill.objectives import TeacherScores
from tutelage.distill.objectives.scores import CHUNK
from tutelage.scheduler.episodes import Row


class TransformersTeacher:
    """A frozen transformers model. The scheduler runs it in this process or as a Ray actor.

    Args:
        model: a causal LM.
        vocabulary: ids that take probability; the embedding's padding beyond them does not.
        max_tokens: tokens, padding included, in one forward.
    """

    def __init__(self, model: Any, *, vocabulary: int, max_tokens: int = 32_768) -> None:
        self.model, self.vocabulary, self._max_tokens = model, vocabulary, max_tokens

    @torch.no_grad()  # not inference_mode: its tensors could not meet the student's in a loss
    def score(
        self,
        rows: Sequence[Row],
        *,
        k: int,
        asked: Sequence[torch.Tensor] | None = None,
        full: bool = False,
    ) -> list[TeacherScores]:
        """The scores of each row's chosen tokens, on the CPU, in the rows' order.

        k: how many of its own ids a token. asked: for each row, ids [N, J] at which it is also
        wanted. full: keep every log-probability, 4 V bytes a token.
        """
        scores: dict[int, TeacherScores] = {}
        head = self.model.get_output_embeddings()
        size = max(1, CHUNK // self.vocabulary)
        for batch in pack(rows, max_tokens=self._max_tokens, device=self.model.device):
            hidden_ND = batch.hidden(self.model)
            asked_NJ = None
            if asked is not None:
                asked_NJ = torch.cat([asked[i] for i in batch.members]).to(hidden_ND.device)
            parts = [
                TeacherScores.from_logits(
                    head(hidden_ND[at : at + size])[:, : self.vocabulary],
                    batch.targets_N[at : at + size],
                    k=k,
                    keep_full=full,
                    asked_ids_NJ=None if asked_NJ is None else asked_NJ[at : at + size],
                ).to("cpu")  # lessons are data, not device memory
                for at in range(0, len(hidden_ND), size)
            ]
            joined = TeacherScores.join(parts)
            start = 0
            for member in batch.members:
                count = int(rows[member].chosen_T.sum())
                scores[member] = joined.take(torch.arange(start, start + count))
                start += count
        return [scores[i] for i in range(len(rows))]
