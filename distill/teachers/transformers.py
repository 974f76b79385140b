"""A teacher in transformers: it scores the student's tokens in batched forwards, and generates
nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.models.architecture import context_of
from tutelage.distill.models.batches import Batch, pack
from tutelage.distill.models.decoders import decoder_of
from tutelage.distill.models.products import linear
from tutelage.distill.objectives import Needs, TeacherScores
from tutelage.distill.objectives.scores import CHUNK
from tutelage.distill.teachers.transport import QueryIds
from tutelage.scheduler.episodes import Row


class TransformersTeacher:
    """A frozen transformers model. Its scores are the model's numbers, not rounded.

    Args:
        model: a causal LM.
        vocabulary: ids that get probability; the embedding's padding rows beyond them get none.
        max_tokens: the most tokens, padding included, in one forward.
        name: in the configuration.
    """

    remote, retries = False, 0

    def __init__(
        self, model: Any, *, vocabulary: int, max_tokens: int = 32_768, name: str = "teacher"
    ) -> None:
        self._name, self._context = name, context_of(model.config)
        self.model, self.vocabulary, self._max_tokens = model, vocabulary, max_tokens
        self._device, self._decoder = model.device, decoder_of(model)

    @torch.no_grad()  # not inference_mode: its tensors could not meet the student's in a loss
    def score(
        self, rows: Sequence[Row], needs: Needs, query_ids: QueryIds = None
    ) -> list[TeacherScores]:
        """The scores of each row's action tokens, on the CPU, in the rows' order.

        needs: what the scores must hold; `full` takes 4 V bytes a token.

        Raises:
            FloatingPointError: logits that are NaN or infinite; names the row and the token.
            ConfigError: a row is longer than the teacher's context.
        """
        # by positions, not by length: an expert's branches share theirs
        longest = max((int(row.positions_T().max()) + 1 for row in rows), default=0)
        if longest > self._context:
            raise ConfigError(
                f"teachers.{self._name}: a row has {longest} tokens, and its context is"
                f" {self._context} (max_position_embeddings): take a teacher with a longer one, or"
                " shorten the episodes (rollout.max_turns, rollout.max_new_tokens, rollout.context)"
            )
        scores: dict[int, TeacherScores] = {}
        head = self.model.get_output_embeddings()
        size = max(1, CHUNK // self.vocabulary)
        for batch in pack(rows, max_tokens=self._max_tokens, device=self.model.device):
            hidden_ND = batch.hidden(self._decoder)
            query_ids_NJ = None
            if query_ids is not None:
                ids_NJ = np.concatenate([query_ids[i] for i in batch.members])
                query_ids_NJ = torch.from_numpy(ids_NJ).to(hidden_ND.device).long()
            parts = []
            # Block by block: the logits of all tokens at once might take more than the model.
            for at in range(0, len(hidden_ND), size):
                logits_NV = linear(head, hidden_ND[at : at + size])[:, : self.vocabulary]
                self._check(logits_NV, at, batch, rows)
                part = TeacherScores.from_logits(
                    logits_NV,
                    batch.targets_N[at : at + size],
                    k=needs.width,
                    keep_full=needs.full,
                    query_ids_NJ=None if query_ids_NJ is None else query_ids_NJ[at : at + size],
                )
                parts.append(part.to("cpu"))  # scores wait for the learner without device memory
            counts = [int(rows[i].action_mask_T.sum()) for i in batch.members]
            own = TeacherScores.join(parts).split(counts)
            scores.update(zip(batch.members, own, strict=True))
        return [scores[i] for i in range(len(rows))]

    def _check(self, logits_NV: torch.Tensor, at: int, batch: Batch, rows: Sequence[Row]) -> None:
        """Refuse NaN and infinite logits. at: the first one's place among the batch's tokens."""
        # The largest tells all: it is NaN if any is, and -inf elsewhere only excludes an id.
        highest_N = logits_NV.amax(-1)
        if highest_N.isfinite().all():
            return
        n = at + int((~highest_N.isfinite()).nonzero()[0])
        member, before = batch.locate(n)
        place = int(np.flatnonzero(rows[member].action_mask_T)[before])
        raise FloatingPointError(
            f"its logits are NaN or infinite at token {place} (id {rows[member].ids_T[place]}) of"
            f" row {member} of {len(rows)}: check the teacher's weights: they are broken, or too"
            f" large for {self.model.dtype}: fetch them again, or set its dtype to float32"
        )

    def sleep(self) -> None:
        """Leave the device."""
        self.model.to("cpu")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Return to it."""
        self.model.to(self._device)

    def close(self) -> None:
        """There is nothing to release."""
