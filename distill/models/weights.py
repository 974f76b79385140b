"""Weights as they travel between processes."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch


def array_of(weight: torch.Tensor) -> npt.NDArray[np.generic]:
    """A weight as an array. numpy has no bfloat16: its bits travel as uint16."""
    weight = weight.detach().cpu()
    return (weight.view(torch.uint16) if weight.dtype is torch.bfloat16 else weight).numpy()


def weight_of(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """The inverse of `array_of`, without a copy. Only read it: Ray's store is read-only memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        weight = torch.from_numpy(array)
    # no model has weights of uint16, so these are always bfloat16's bits
    return weight.view(torch.bfloat16) if weight.dtype is torch.uint16 else weight
