"""Inverted block lists: for each key block, the tiles that keep it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def inverted_lists(ids: Tensor, counts: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Lists by key block, made on the device: shapes depend on shapes alone, and nothing waits.

    They are the places of what is kept in a table of (block, tile) pairs, counted in their order: one running sum over a table as large
    as that of the scores which the lists were chosen from. A sort of few but long rows would take torch several passes over all of them.

    Args:
        ids: int32 [b, h_kv, tiles, width]; counts: int32 [b, h_kv, tiles]. The first counts entries of a list count, and are distinct.
        blocks: how many key blocks there are.

    Returns:
        tiles int32 [b, h_kv, tiles * width] and offsets int32 [b, h_kv, blocks + 1]: the tiles that keep block j of key head i are
        tiles[b, i, offsets[b, i, j] : offsets[b, i, j + 1]], ascending.
    """
    b, h_kv, tiles, width = ids.shape
    if ids.numel() == 0:
        return ids.new_empty((b, h_kv, tiles * width)), ids.new_zeros((b, h_kv, blocks + 1))
    device = ids.device
    counted = torch.arange(width, dtype=torch.int32, device=device) < counts.unsqueeze(-1)
    kept = torch.zeros((b, h_kv, blocks + 1, tiles), dtype=torch.bool, device=device)
    # Entries that do not count are of one more block, the last of its head.
    kept.transpose(2, 3).scatter_(3, torch.where(counted, ids, blocks).long(), True)
    reached = kept.view(-1).cumsum(0, dtype=torch.int32)
    starts = pad(reached[tiles - 1 :: tiles], (1, -1)).view(b, h_kv, blocks + 1)
    first = starts[..., :1]
    wanted = first + torch.arange(1, tiles * width + 1, dtype=torch.int32, device=device)
    return torch.searchsorted(reached, wanted, out_int32=True) % tiles, starts - first
