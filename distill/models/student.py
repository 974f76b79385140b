"""The student: the model that learns, and everything that other code needs of its weights.

Code that trains, runs, saves or measures it uses this class and does not reach into the model. A
student that trains something else (adapters over frozen weights, say) is another class with these
methods.

Letters: B rows, T tokens of a row, N tokens of a batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tutelage.distill.config.faults import ConfigError
from tutelage.distill.models.batches import Batch
from tutelage.distill.models.decoders import Decoder, decoder_of
from tutelage.distill.models.products import linear
from tutelage.distill.objectives import DenseStudent, SparseStudent, StudentView
from tutelage.evaluation.run_folder import WEIGHTS

DENSE_VOCABULARY = 8192
"""Up to this many ids, whole logits are small and faster than gathered ones."""


class Student:
    """A causal language model over the tokenizer's ids, of which every weight trains.

    Args:
        model: transformers' model, trained in place.
        vocabulary: the tokenizer's ids. Rows of the embedding beyond them are padding and take no
            probability.
        dense_vocabulary: up to this size of vocabulary, whole logits; above it, gathered ones.
    """

    def __init__(
        self, model: Any, *, vocabulary: int, dense_vocabulary: int = DENSE_VOCABULARY
    ) -> None:
        self.model, self.vocabulary = model, vocabulary
        self._dense = vocabulary <= dense_vocabulary

    @property
    def settings(self) -> Any:
        """transformers' configuration of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self.model.dtype
        return found

    @property
    def rows(self) -> int:
        """Rows of its embedding, padding included."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @cached_property
    def decoder(self) -> Decoder:
        """Everything but the head."""
        return decoder_of(self.model)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """The head's logits [N, V]."""
        return linear(self.model.get_output_embeddings(), hidden_ND)[:, : self.vocabulary]

    def view(self, batch: Batch) -> StudentView:
        """The student at the batch's tokens, as an objective sees it: one forward."""
        hidden_ND = batch.hidden(self.decoder)
        if self._dense:
            return DenseStudent(self.logits(hidden_ND))
        head = self.model.get_output_embeddings()
        return SparseStudent(hidden_ND, head, vocabulary=self.vocabulary)

    def plain_logprobs(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the token after each of one text's [T, V], by the model's own
        forward: a reference that shares no code with `decoder` and `view`."""
        logits_TV = self.model(input_ids=ids_T.long()[None].to(self.device)).logits[0]
        found: torch.Tensor = logits_TV[:, : self.vocabulary].float().log_softmax(-1)
        return found

    def trainable(self) -> list[torch.nn.Parameter]:
        """The parameters that an optimizer moves."""
        return list(self.model.parameters())

    def hidden_matrices(self) -> list[torch.nn.Parameter]:
        """Every matrix except the embedding and the head."""
        ends = self._ends()
        return [p for p in self.model.parameters() if p.ndim == 2 and id(p) not in ends]

    def weights(self) -> dict[str, torch.Tensor]:
        """What an engine needs to generate: parameters by name, without a copy; a tied embedding
        once, and no rows of padding."""
        ends = self._ends()
        return {  # named_parameters, unlike state_dict, has a tied weight once
            name: weight.detach()[: self.vocabulary] if id(weight) in ends else weight.detach()
            for name, weight in self.model.named_parameters()
        }

    def take(self, weights: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Copy the `weights` of another process's student into this one.

        Raises:
            ValueError: some are missing; nothing is copied then.
        """
        own = self.weights()
        if missing := sorted(set(own) - set(weights)):
            raise ValueError(
                f"weights for version {version} lack {missing[0]!r} and {len(missing) - 1} more"
            )
        for name, tensor in own.items():
            tensor.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write a checkpoint's model files: Hugging Face format, the weights in one file."""
        # in one file, which `load` and the checksums know by name
        self.model.save_pretrained(folder, max_shard_size="10000GB")

    def load(self, folder: Path) -> None:
        """Take the weights that `save` wrote.

        Raises:
            ConfigError: they are of another architecture or vocabulary.
        """
        from safetensors.torch import load_file

        weights, own = load_file(folder / WEIGHTS), self.model.state_dict()
        stored = {own[name].data_ptr() for name in weights if name in own}
        for name in sorted({*weights, *own}):
            there, here = weights.get(name), own.get(name)
            if there is None and here is not None and here.data_ptr() in stored:
                continue  # safetensors stores tied weights once
            if there is None or here is None or there.shape != here.shape:
                raise ConfigError(
                    f"{folder}: {name} has shape {_shape(there)} there and {_shape(here)} in this"
                    " run's student: the checkpoint is of another model or vocabulary; choose"
                    " another run folder"
                )
        self.model.load_state_dict(weights, strict=False)
        self.model.tie_weights()

    def recomputing(self) -> list[Any]:
        """Have the layers recompute their activations in the backward instead of keeping them.
        Returns the layers: each recomputes while its own `training` flag is set. The modules inside
        it stay in evaluation mode, without dropout.

        Raises:
            ConfigError: the model has no layers that can.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [x for x in self.model.modules() if isinstance(x, GradientCheckpointingLayer)]
        if not layers:
            raise ConfigError(
                f"optimizer.recompute: {type(self.model).__name__} has no layers that can: set it"
                " to false"
            )
        self.model.gradient_checkpointing_enable(
            # the reentrant kind needs inputs with gradients, and takes no keyword arguments
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        return layers

    def replica(self) -> Student:
        """A copy in memory of its own, which nothing trains."""
        found = copy.deepcopy(self)
        found.model.requires_grad_(False)
        return found

    def _ends(self) -> set[int]:
        """The embedding and the head, by identity; where they are tied they are one."""
        layers = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return {id(layer.weight) for layer in layers}


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else str(tuple(tensor.shape))
