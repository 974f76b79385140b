"""The K largest numbers of a row, by whichever library is faster."""

from __future__ import annotations

import pytest
import torch

from tutelage.distill.objectives.largest import top_k


@pytest.mark.parametrize("k", [1, 3, 40, 100])
def test_they_are_torchs(k: int) -> None:
    """Also among numbers that are not finite, from a part of a larger tensor, and with none."""
    values_NV = torch.randn(50, 120, generator=torch.Generator().manual_seed(k))
    values_NV[values_NV < -1.5] = -torch.inf
    part_NV = values_NV[:, :100].requires_grad_()
    found_NK, ids_NK = top_k(part_NV, k)
    assert torch.equal(found_NK, part_NV.topk(k, dim=-1).values)
    assert torch.equal(found_NK, part_NV.gather(1, ids_NK))
    assert all(len(set(own)) == k for own in ids_NK.tolist())
    assert not found_NK.requires_grad
    assert top_k(part_NV[:0], k)[1].shape == (0, k)
