"""What the reference, the fakes and the kernels of sparse attention must agree on: shapes of block lists, owned blocks, order of ties.

Queries stand in tiles of `query_block`, keys in blocks of `key_block`; the last of each may be partial. Query i stands at key position
i + (m - n).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import overload

import torch
from torch import SymInt, Tensor

from sptc.ir.sample import POOLED_QUERIES

STATISTICS_ROWS = 256  # of a head over the whole batch: enough for 16 codewords a step, and cheap beside attention


@overload
def block_count(length: int, block: int) -> int: ...
@overload
def block_count(length: SymInt, block: int) -> SymInt: ...
def block_count(length: int | SymInt, block: int) -> int | SymInt:
    """ceil(length / block), also for symbolic lengths."""
    return -(-length // block)


def statistics_stride(batch: int, length: int) -> int:
    """Codebook statistics look at rows 0, stride, 2 * stride, ... of each sequence."""
    return max(1, min(batch * length // STATISTICS_ROWS, length))


def query_run(query_block: int) -> int:
    """Queries of a tile that the pooled selector stands for by their mean: the largest divisor of `query_block` up to 16."""
    return max(run for run in range(1, min(query_block, POOLED_QUERIES) + 1) if query_block % run == 0)


def owned_blocks(n: int | SymInt, m: int | SymInt, query_block: int, key_block: int) -> int | SymInt:
    """The most blocks in which the positions of one tile can lie, over all tiles of any sequence with this m - n."""
    step = math.gcd(query_block, key_block)  # tiles start at every multiple of it inside a block, shifted by m - n
    furthest = key_block - step + (m - n) % step
    return (furthest + query_block - 1) // key_block + 1


def list_width(n: int | SymInt, m: int | SymInt, density: float, query_block: int, key_block: int, own: bool) -> int | SymInt:
    """Capacity of a tile's list: min(blocks, max(owned, ceil(ceil(density * m) / key_block))), in exact arithmetic.

    Raises:
        ValueError: density outside (0, 1], or a block size below 1.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if query_block < 1 or key_block < 1:
        raise ValueError(f"query_block and key_block must be at least 1, got {query_block} and {key_block}")
    share = Fraction(density).limit_denominator(2**16) or Fraction(1, 2**16)
    kept = -(-share.numerator * m // share.denominator)
    width = block_count(kept, key_block)
    if own and query_block > 1:
        width = torch.sym_max(width, owned_blocks(n, m, query_block, key_block))
    return torch.sym_min(width, block_count(m, key_block))


def owned(n: int, m: int, query_block: int, key_block: int, device: torch.device) -> Tensor:
    """bool [tiles, blocks]: the block holds the position of some query of the tile."""
    first = torch.arange(block_count(n, query_block), device=device).unsqueeze(1) * query_block
    last = (first + query_block).clamp(max=n) - 1
    block = torch.arange(block_count(m, key_block), device=device)
    start = block * key_block
    return (last + (m - n) >= start) & (first + (m - n) < start + key_block)


def nearest_first(n: int, m: int, query_block: int, key_block: int, device: torch.device) -> Tensor:
    """int64 [tiles, blocks]: block numbers by distance between the centres of tile and block, the lower number first where equal."""
    tile = torch.arange(block_count(n, query_block), device=device).unsqueeze(1)
    block = torch.arange(block_count(m, key_block), device=device)
    # Twice the distance keeps half positions integral.
    distance = (2 * (tile * query_block + (m - n) - block * key_block) + query_block - key_block).abs()
    return distance.argsort(dim=1, stable=True)


def lists_from_scores(scores: Tensor, allowed: Tensor, must: Tensor | None, order: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The best `width` allowed blocks of each tile.

    Args:
        scores: [..., tiles, blocks], finite.
        allowed: bool, broadcastable to scores.
        must: bool [tiles, blocks]: allowed blocks that come before all others; None for none.
        order: int64 [tiles, blocks] of `nearest_first`: of equal scores, the earlier in this order.
        width: capacity.

    Returns:
        ids int32 [..., tiles, width], ascending and distinct in their first counts, zero after; counts int32 [..., tiles].
    """
    ranked = scores if must is None else scores.masked_fill(must, math.inf)
    ranked = ranked.masked_fill(~allowed, -math.inf)
    order = order.expand(ranked.shape)
    best = ranked.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    blocks = ranked.shape[-1]
    chosen = order.gather(-1, best.indices[..., :width]).masked_fill_(best.values[..., :width] == -math.inf, blocks)
    chosen = chosen.sort(dim=-1).values
    valid = chosen < blocks
    return chosen.mul_(valid).to(torch.int32), valid.sum(-1, dtype=torch.int32)
