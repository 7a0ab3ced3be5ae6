"""Inverted block lists: for each key block, the tiles that keep it."""

from __future__ import annotations

import torch
from torch import Tensor


def inverted_lists(ids: Tensor, counts: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Lists by key block, made on the device: shapes depend on shapes alone, and nothing waits.

    Args:
        ids: int32 [b, h_kv, tiles, width]; counts: int32 [b, h_kv, tiles]. The first counts entries of a list count.
        blocks: how many key blocks there are.

    Returns:
        tiles int32 [b, h_kv, tiles * width] and offsets int32 [b, h_kv, blocks + 1]: the tiles that keep block j of key head i are
        tiles[b, i, offsets[b, i, j] : offsets[b, i, j + 1]], ascending.
    """
    width = ids.shape[3]
    counted = torch.arange(width, dtype=torch.int32, device=ids.device) < counts.unsqueeze(-1)
    # Entries that do not count sort behind all blocks.
    ordered, places = torch.where(counted, ids, blocks).flatten(2).sort(dim=-1, stable=True)
    starts = torch.arange(blocks + 1, dtype=torch.int32, device=ids.device).expand(*ids.shape[:2], -1)
    offsets = torch.searchsorted(ordered, starts.contiguous(), out_int32=True)
    return (places // max(width, 1)).to(torch.int32), offsets
