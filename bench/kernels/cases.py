"""What the kernels are tried on: attention and FFNs as models have them, with operands on any device, "meta" included.

A case is what the product does unless it says otherwise: selector, density, FFN blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sptc.expression import parse


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


@dataclass(frozen=True)
class FfnCase:
    """y = down(act(up(x))) of `tokens` tokens. `lora` is the rank of adapters on every projection, 0 for none."""

    name: str
    tokens: int
    d: int
    hidden: int
    activation: str  # a key of ACTIVATIONS
    bias: bool
    lora: int = 0
    weights_train: bool = False
    scaled: bool = True  # blocks are scaled by their router score
    conv1d: bool = False  # weights are stored [in, out]
    dropout: float = 0.0
    blocks: int = 16
    active: int = 8

    @property
    def text(self) -> str:
        return parse(self.activation).text

    @property
    def ups(self) -> int:
        return parse(self.activation).arity


@dataclass(frozen=True)
class FfnOperands:
    """The tensors of `sptc::routed_ffn` (docs/architecture.md) but its lists, and gradients of its outputs."""

    x: Tensor
    up: list[Tensor]
    up_bias: list[Tensor]
    low: list[Tensor]
    up_B: list[Tensor]
    down: Tensor
    down_A: Tensor | None
    scores: Tensor  # [N, G]
    seed: Tensor | None
    grad_y: Tensor
    grad_low_out: Tensor | None


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu(u0)": F.relu,
    "gelu(u0)": F.gelu,
    "gelu_tanh(u0)": lambda u: F.gelu(u, approximate="tanh"),
    "u1*silu(u0)": lambda u, v: F.silu(u) * v,
}


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


def ffn_operands(case: FfnCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> FfnOperands:
    """Random operands."""
    draw = _Draw(seed, device, dtype)
    n, d, hidden, rank, ups = case.tokens, case.d, case.hidden, case.lora, range(case.ups)

    def weight(rows: int, columns: int) -> Tensor:
        stored = draw(columns, rows).t() if case.conv1d else draw(rows, columns)
        return stored.mul_(columns**-0.5)

    return FfnOperands(
        x=draw(n, d),
        up=[weight(hidden, d) for _ in ups],
        up_bias=[draw(hidden).mul_(0.1) for _ in ups if case.bias],
        low=[draw(n, rank) for _ in ups if rank],
        up_B=[draw(hidden, rank).mul_(0.1) for _ in ups if rank],
        down=weight(d, hidden).t(),
        down_A=draw(rank, hidden).mul_(hidden**-0.5) if rank else None,
        scores=torch.sigmoid(draw(n, case.blocks, dtype=torch.float32)),
        seed=torch.full((), 99 + seed, dtype=torch.int64, device=device) if case.dropout else None,
        grad_y=draw(n, d),
        grad_low_out=draw(n, rank) if rank else None,
    )


class _Draw:
    """Normal numbers from a generator of the device; none on "meta"."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32, device=self.device)
        return values.to(dtype or self.dtype)


# The four model families, at sizes of which only divisibility matters to a compiler

ATTENTION = tuple(
    replace(case, name=f"{case.name} d{size}", size=size)
    for size in (64, 128)
    for case in (
        AttentionCase("LLaMA-like", 2, 2048, 8, 2, 64, "causal", selector="pq"),
        AttentionCase("OPT-like", 2, 2048, 8, 8, 64, "causal"),
        AttentionCase("GPT-2-like", 2, 1024, 8, 8, 64, "causal", dropout=0.1, selector="pq"),
        AttentionCase("BERT-like", 4, 512, 8, 8, 64, "padding", dropout=0.1, selector="pq"),
    )
)
FFN = (
    FfnCase("LLaMA-like", 4096, 2560, 6912, "u1*silu(u0)", bias=False, lora=16),
    FfnCase("OPT-like", 4096, 2048, 8192, "relu(u0)", bias=True, weights_train=True),
    FfnCase("GPT-2-like", 4096, 768, 3072, "gelu_tanh(u0)", bias=True, lora=16, conv1d=True),
    FfnCase("BERT-like", 4096, 768, 3072, "gelu(u0)", bias=True, weights_train=True, scaled=False, dropout=0.1),
)


def named(cases: Sequence[Any], only: str) -> list[Any]:
    """The cases whose name contains `only`."""
    return [case for case in cases if only.lower() in case.name.lower()]
