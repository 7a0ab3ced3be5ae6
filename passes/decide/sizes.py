"""The sizes of a region as its cost wants them: numbers, or expressions in the one length that it varies with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
import torch

from sptc.ir.hint import optimization_hint
from sptc.ir.region import AttentionRegion, FfnRegion, Region, RouterState, State
from sptc.passes.decide.cost import AttentionShape, FfnShape, Size
from sptc.passes.graph.pattern import argument, dtype, op, requires_grad, shape

LENGTH = sympy.Symbol("length", positive=True, integer=True)


@dataclass(frozen=True)
class Length:
    """What a region's cost varies with: tokens of an FFN, queries of attention, or the first other symbolic size."""

    size: int | torch.SymInt
    hint: int

    def __call__(self, size: int | torch.SymInt) -> Size:
        """A size as an expression in the length; symbols other than the length's are fixed at their hints."""
        if isinstance(size, int):
            return size
        if isinstance(self.size, torch.SymInt):
            own, expression = self.size.node.expr, size.node.expr
            if own == expression:
                return LENGTH
            if own.is_Symbol and expression.has(own):
                others = {
                    s: optimization_hint(size.node.shape_env.create_symintnode(s, hint=None)) for s in expression.free_symbols - {own}
                }
                return expression.xreplace({**others, own: LENGTH})
        return optimization_hint(size)


def length_of(region: Region) -> Length:
    """The length that a region's cost varies with."""
    if isinstance(region, FfnRegion):
        size = math.prod(shape(region.x)[:-1])
        return Length(size, optimization_hint(size))
    b, h, n, _ = four(shape(region.q))
    m = shape(region.k)[-2]
    symbolic = [size for size in (n, m, b, h) if isinstance(size, torch.SymInt)]
    size = symbolic[0] if symbolic else n
    return Length(size, optimization_hint(size))


def four(sizes: tuple[int | torch.SymInt, ...]) -> tuple[int | torch.SymInt, ...]:
    """The sizes of an operand of attention with its batch, which may be missing."""
    return sizes if len(sizes) == 4 else (1, *sizes)


def attention_shape(region: AttentionRegion, length: Length) -> AttentionShape:
    """The sizes of attention, and which gradients it has."""
    b, h, n, d = (length(size) for size in four(shape(region.q)))
    _, h_kv, m, d_v = (length(size) for size in four(shape(region.v)))
    kernels = [node for node in region.nodes if op(node) == "aten.scaled_dot_product_attention.default"]
    trains = requires_grad(region.y)
    return AttentionShape(
        *(b, h, h_kv, n, m, d, d_v),
        dtype=dtype(region.y),
        fused=bool(kernels),
        halved=bool(kernels) and argument(kernels[0], 5, "is_causal", False) is True,
        own=region.mask.causal,
        need=(trains and requires_grad(region.q), trains and requires_grad(region.k), trains and requires_grad(region.v)),
    )


def ffn_shape(region: FfnRegion, state: State | None, length: Length) -> FfnShape:
    """The sizes of an FFN, its adapters and its state, and which gradients it has."""
    trains, tokens = requires_grad(region.y), math.prod(shape(region.x)[:-1])
    adapters = [up.lora for up in region.ups if up.lora is not None]
    down = region.down.lora
    every = [*adapters, *([down] if down is not None else [])]
    return FfnShape(
        tokens=length(tokens),
        d=int(shape(region.x)[-1]),
        hidden=region.hidden,
        d_out=int(shape(region.y)[-1]),
        ups=len(region.ups),
        up_ranks=sum(int(shape(lora.a)[0]) for lora in adapters),
        down_rank=int(shape(down.a)[0]) if down is not None else 0,
        dtype=dtype(region.y),
        stand_in_rank=int(shape(state.low)[0]) if isinstance(state, RouterState) else 0,
        trained_router=isinstance(state, RouterState) and state.training,
        need_x=trains and requires_grad(region.x),
        need_ups=sum(trains and requires_grad(up.weight) for up in region.ups),
        need_down=trains and requires_grad(region.down.weight),
        need_adapters=trains and any(requires_grad(lora.b) for lora in every),
    )
