"""Operands for tests of sparse attention: tensors strided as in a model, and one mask of every kind."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

MaskOperands: TypeAlias = tuple[str, list[Tensor], list[int], Tensor | None, Tensor | None]

MASKS = ["none", "causal", "aligned", "window", "padding", "causal padding", "documents", "per head", "nothing", "left padding"]
MASKS += ["boolean", "boolean row", "bias", "bias row", "all"]


def heads(b: int, h: int, length: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """[b, length, h, d] transposed to [b, h, length, d]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, length, h, d, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)


def operands(name: str, b: int, h: int, n: int, m: int) -> MaskOperands:
    """predicate, tensors, sizes, mask, bias of scores [b, h, n, m]."""
    generator = torch.Generator().manual_seed(4)
    padding = torch.arange(m) < torch.randint(1, m + 1, (b, 1), generator=generator)
    documents = torch.randint(0, 4, (b, max(n, m)), generator=generator).sort().values
    scattered = torch.rand(b, 1, n, m, generator=generator) > 0.6
    bias = torch.randn(1, h, n, m, generator=generator, dtype=torch.float64)
    hidden = torch.where(padding[:, None, None], 0.0, torch.finfo(torch.float32).min).to(torch.float32)
    return {
        "none": ("True", [], [], None, None),
        "causal": ("k <= q", [], [], None, None),
        "aligned": ("k <= q + s0", [], [m - n], None, None),
        "window": ("(k <= q) & (k > q - s0)", [], [7], None, None),
        "padding": ("t0[b, k]", [padding], [], None, None),
        "causal padding": ("(k <= q) & t0[b, k]", [padding], [], None, None),
        "documents": ("(t0[b, q] == t0[b, k]) & (k <= q)", [documents], [], None, None),
        "per head": ("(k + h) % 3 != 0", [], [], None, None),
        "nothing": ("k < 0", [], [], None, None),
        "left padding": ("(k <= q) & t0[b, k]", [padding.flip(1)], [], None, None),
        "boolean": ("True", [], [], scattered, None),
        "boolean row": ("k <= q", [], [], padding[:, None, None].expand(b, 1, n, m), None),
        "bias": ("True", [], [], None, bias.masked_fill(bias > 1, -torch.inf)),
        "bias row": ("k <= q", [], [], None, hidden),
        "all": ("(k <= q + 3) & t0[b, k]", [padding], [], scattered, bias),
    }[name]
