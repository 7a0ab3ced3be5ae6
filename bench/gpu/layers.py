"""One attention layer or one FFN, forward and backward, in one of the forms that a user could have instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ffn import Case as FfnCase
from bench.ffn import Ffn, Layer, routed
from bench.gpu.journal import Figures
from bench.gpu.sizes import Sizes
from bench.gpu.stage import Limit
from bench.gpu.timing import one, timed
from bench.kernels import steps
from bench.kernels.cases import AttentionCase, AttentionOperands, attention_operands
from sptc.codegen.ops import block_products

Form = Callable[[AttentionCase, AttentionOperands], Tensor]


def _with(backend: SDPBackend) -> Form:
    def dense(case: AttentionCase, o: AttentionOperands) -> Tensor:
        with sdpa_kernel([backend, SDPBackend.MATH] if o.q.device.type == "cpu" else [backend]):
            return F.scaled_dot_product_attention(o.q, o.k, o.v, is_causal=case.own, enable_gqa=case.heads != case.kv_heads)

    return dense


def _sparse(case: AttentionCase, o: AttentionOperands) -> Tensor:
    return steps.attend(case, o, *steps.select(case, o)[:2])[0]


ATTENTION: dict[str, Form] = {"flash": _with(SDPBackend.FLASH_ATTENTION), "sparse": _sparse, "cudnn": _with(SDPBackend.CUDNN_ATTENTION)}
ROUTED = "routed 1/2"
FFN: dict[str, Callable[[Ffn], Callable[[Tensor], Tensor]]] = {
    "dense": lambda layer: layer.dense,
    "units 1/2": lambda layer: lambda x: layer.units(x, 1 / 2),
    "units 1/4": lambda layer: lambda x: layer.units(x, 1 / 4),
    "1/4 of tokens dense, others units 1/8": lambda layer: lambda x: layer.counted(x, 1 / 4, 1 / 8),
    ROUTED: lambda layer: layer.dense,  # as the backend rewrites it
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "mm": lambda x, weight, tokens, _: x.index_select(0, tokens) @ weight[0].t(),
    "by blocks": block_products.gather_product,
    "grouped": block_products.grouped_gather_product,
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
        layer = Layer(case).to(sizes.dtype)
        x = torch.randn(case.tokens, case.d, dtype=sizes.dtype, requires_grad=True)
        grad = torch.randn(case.tokens, case.d, dtype=sizes.dtype)
    run: Any
    if form == ROUTED:
        run = routed(layer, x.detach(), aot_eager if sizes.dry else None)
    else:
        run = torch.compile(FFN[form](layer.ffn), dynamic=False, backend="aot_eager" if sizes.dry else "inductor")
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    yield from timed_rows(lambda: run(x), leaves, grad, sizes, limit)


def product(case: FfnCase, form: str, sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """The product of a router's list entries, gathered, with the weights of one block, or each with those of its own."""
    x = torch.randn(case.tokens, case.d, device=sizes.device, dtype=torch.bfloat16)
    weight = torch.randn(case.blocks, case.hidden // case.blocks, case.d, device=sizes.device, dtype=torch.bfloat16)
    tokens, _, offsets = torch.ops.sptc.route(torch.randn(case.tokens, case.blocks, device=sizes.device), case.blocks // 2)
    ms = one(lambda: PRODUCTS[form](x, weight, tokens, offsets), sizes, limit).ms
    yield {"forward_ms": ms, "tflops": 2 * len(tokens) * case.d * weight.shape[1] / ms / 1e9}


def timed_rows(run: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor, sizes: Sizes, limit: Limit) -> Iterator[Figures]:
    """Forward, and forward with backward; not every form has a gradient for every leaf."""
    calls = {"forward": run, "both": lambda: torch.autograd.grad(run(), leaves, grad, allow_unused=True)}
    times = timed(calls, sizes, limit)
    both = times["both"]
    yield {"forward_ms": times["forward"].ms, "both_ms": both.ms, "host_ms": both.host_ms, "peak_mib": both.peak_mib}
