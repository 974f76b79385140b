"""The K largest numbers of each row, largest first.

Letters: N rows, V numbers of a row, K of them.
"""

from __future__ import annotations

import numpy as np
import torch


def top_k(values_NV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the K largest values of each row, their places) [N, K]; ties in no order. No gradient."""
    values_NV = values_NV.detach()
    # On a CPU torch keeps a heap of K where K is a 64th of V or less, and else partitions pairs of
    # value and place, one by one; numpy partitions with vector instructions, three times as fast.
    if values_NV.device.type != "cpu" or 64 * k <= values_NV.shape[1]:
        found = torch.topk(values_NV, k, dim=-1)
        return found.values, found.indices
    places_NK = np.argpartition(values_NV.numpy(), -k, axis=-1)[:, -k:]
    any_NK = torch.from_numpy(places_NK)
    found_NK, order_NK = values_NV.gather(1, any_NK).sort(dim=-1, descending=True)
    return found_NK, any_NK.gather(1, order_NK)
