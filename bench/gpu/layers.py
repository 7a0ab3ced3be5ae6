"""One attention layer or one FFN, forward and backward, in one of the forms that a user could have instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ffn import Ffn
from bench.gpu.journal import Figures
from bench.gpu.sizes import Sizes, forms
from bench.gpu.stage import Limit
from bench.gpu.timing import one, timed
from bench.kernels import steps
from bench.kernels.cases import AttentionCase, AttentionOperands, FfnCase, attention_operands
from sptc.codegen.routing import chosen_pairs

Form = Callable[[AttentionCase, AttentionOperands], Tensor]


def _with(backend: SDPBackend) -> Form:
    def dense(case: AttentionCase, o: AttentionOperands) -> Tensor:
        with sdpa_kernel([backend, SDPBackend.MATH] if o.q.device.type == "cpu" else [backend]):
            return F.scaled_dot_product_attention(o.q, o.k, o.v, is_causal=case.own, enable_gqa=case.heads != case.kv_heads)

    return dense


def _sparse(case: AttentionCase, o: AttentionOperands) -> Tensor:
    return steps.attend(case, o, *steps.select(case, o)[:2])[0]


ATTENTION: dict[str, Form] = {"flash": _with(SDPBackend.FLASH_ATTENTION), "sparse": _sparse, "cudnn": _with(SDPBackend.CUDNN_ATTENTION)}
FFN: dict[str, Callable[[Ffn], Callable[[Tensor], Tensor]]] = {
    "dense": lambda layer: layer.dense,
    "units 1/2": lambda layer: lambda x: layer.units(x, 1 / 2),
    "units 1/4": lambda layer: lambda x: layer.units(x, 1 / 4),
    "1/4 of tokens dense, others units 1/8": lambda layer: lambda x: layer.counted(x, 1 / 4, 1 / 8),
    "routed 1/2": lambda layer: layer.routed,
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mm": lambda rows, weights, _: rows @ weights[0],
    "_grouped_mm": lambda rows, weights, ends: torch._grouped_mm(rows, weights, offs=ends),
}


def attention(case: AttentionCase, form: str, sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """Selection included in the sparse form."""
    o = attention_operands(case, sizes.device, sizes.dtype)
    leaves = [x.requires_grad_() for x in (o.q, o.k, o.v)]
    yield from timed_rows(lambda: ATTENTION[form](case, o), leaves, o.grad, sizes, limit)


def ffn(case: FfnCase, form: str, sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """Compiled by Inductor, router and stand-in, or the choice of units, included. What LoRA trains gets gradients, and so does x."""
    torch.manual_seed(0)
    with torch.device(sizes.device):
        layer = Ffn(forms(case)).to(sizes.dtype)
        x = torch.randn(case.tokens, case.d, dtype=sizes.dtype, requires_grad=True)
        grad = torch.randn(case.tokens, case.d, dtype=sizes.dtype)
    run: Any = torch.compile(FFN[form](layer), dynamic=False, backend="aot_eager" if sizes.dry else "inductor")
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    yield from timed_rows(lambda: run(x), leaves, grad, sizes, limit)


def product(case: FfnCase, form: str, sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """A library's product of a router's list entries with the weights of one block, or each with those of its own."""
    dtype = torch.bfloat16  # the only one that torch's grouped product takes
    rows = torch.randn(case.tokens * case.active, case.d, device=sizes.device, dtype=dtype)
    weights = torch.randn(case.blocks, case.d, case.hidden // case.blocks, device=sizes.device, dtype=dtype)
    ends = chosen_pairs(torch.randn(case.tokens, case.blocks, device=sizes.device), case.active, None).sum(1).cumsum(0).to(torch.int32)
    ms = one(lambda: PRODUCTS[form](rows, weights, ends), sizes, limit).ms
    yield {"forward_ms": ms, "tflops": 2 * rows.shape[0] * case.d * weights.shape[2] / ms / 1e9}


def timed_rows(run: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor, sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """Forward, and forward with backward; not every form has a gradient for every leaf."""
    calls = {"forward": run, "both": lambda: torch.autograd.grad(run(), leaves, grad, allow_unused=True)}
    times = timed(calls, sizes, limit)
    both = times["both"]
    yield {"forward_ms": times["forward"].ms, "both_ms": both.ms, "host_ms": both.host_ms, "peak_mib": both.peak_mib}
