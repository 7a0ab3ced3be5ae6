"""How many rows a product has where that is data: few numbers, not any.

oneDNN makes a kernel for each number of rows, up to a megabyte in a millisecond, and keeps the last 1,024 of them. Batches are padded each
in its own way and labels count here and there, so that no two have the same numbers, and the process would grow with each. So rows are
rounded up: to one of 16 shares of all tokens (`units.in_steps`, `block_products`), the last chunk of a loss to one of eight of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARES = 16  # of all tokens


def lengthened(rows: Tensor, number: int) -> Tensor:
    """`rows`, [n, ...], the last one repeated until there are `number`, n or more. n is not 0."""
    more = number - rows.shape[0]
    return torch.cat([rows, rows[-1:].expand(more, *rows.shape[1:])]) if more else rows
