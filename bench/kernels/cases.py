"""What the kernels are tried on: attention as models have it, with operands on any device, "meta" included.

A case is what the product does unless it says otherwise: selector, density, blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionCase:
    """Self-attention of `batch` sequences; `mask` is "causal", "padding" (of up to half of the keys) or "none"."""

    name: str
    batch: int
    length: int
    heads: int
    kv_heads: int
    size: int
    mask: str
    density: float = 1 / 8
    query_block: int = 128
    key_block: int = 64
    dropout: float = 0.0
    selector: str = "pooled"
    transform: str = "u0"  # of each score, as of `sptc::sparse_attention`

    @property
    def scale(self) -> float:
        return float(self.size) ** -0.5

    @property
    def own(self) -> bool:
        return self.mask == "causal"


@dataclass(frozen=True)
class AttentionOperands:
    """q [b, h, n, d], k and v [b, h_kv, n, d], laid out as a model has them ([b, n, h, d] in memory), and a gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    codebooks: Tensor | None
    mask: tuple[str, list[Tensor], list[int], Tensor | None, Tensor | None]
    seed: Tensor | None


def attention_operands(case: AttentionCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> AttentionOperands:
    """Random operands."""
    b, n, d = case.batch, case.length, case.size
    draw = _Draw(seed, device, dtype)
    q, grad = (draw(b, n, case.heads, d).transpose(1, 2) for _ in range(2))
    k, v = (draw(b, n, case.kv_heads, d).transpose(1, 2) for _ in range(2))
    subspace = 8
    codebooks = draw(case.kv_heads, d // subspace, 16, subspace, dtype=torch.float32) if case.selector == "pq" else None
    lengths = torch.linspace(n // 2, n, b, device=device).long().unsqueeze(1)
    padding = [torch.arange(n, device=device) < lengths] if case.mask == "padding" else []
    predicate = {"causal": "k <= q", "padding": "t0[b, k]", "none": "True"}[case.mask]
    key = torch.full((), 1234 + seed, dtype=torch.int64, device=device) if case.dropout else None
    return AttentionOperands(q, k, v, grad, codebooks, (predicate, padding, [], None, None), key)


class _Draw:
    """Normal numbers from a generator of the device; none on "meta"."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)
        return values.to(dtype or self.dtype)


# Model families, at sizes of which only divisibility matters to a compiler

ATTENTION = tuple(
    replace(case, name=f"{case.name} d{size}", size=size)
    for size in (64, 128)
    for case in (
        AttentionCase("LLaMA-like", 2, 2048, 8, 2, 64, "causal", selector="pq"),
        AttentionCase("OPT-like", 2, 2048, 8, 8, 64, "causal"),
        AttentionCase("GPT-2-like", 2, 1024, 8, 8, 64, "causal", dropout=0.1, selector="pq"),
        AttentionCase("BERT-like", 4, 512, 8, 8, 64, "padding", dropout=0.1, selector="pq"),
        AttentionCase("soft-capped", 2, 2048, 8, 8, 64, "causal", transform="50*tanh(0.02*u0)"),
    )
)


def named(cases: Sequence[Any], only: str) -> list[Any]:
    """The cases whose name contains `only`."""
    return [case for case in cases if only.lower() in case.name.lower()]
