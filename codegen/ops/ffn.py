"""Schemas, fakes, autograd and autocast rules of the routed FFN ops. docs/architecture.md defines them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sptc.codegen.cpu import ffn as cpu
from sptc.codegen.kernels import ffn as kernels
from sptc.codegen.kernels import route as kernel_route
from sptc.codegen.ops import autocast
from sptc.codegen.ops.implementation import implement
from sptc.expression import parse

_OPERANDS = (
    "Tensor x, Tensor[] up, Tensor[] up_bias, int[] biased, Tensor[] low, Tensor[] up_B, int[] adapted, Tensor down, Tensor? down_A, "
    "Tensor tokens, Tensor offsets, Tensor? scale, Tensor? seed, Tensor? lora_seed, float dropout_p, float lora_dropout_p, str activation"
)

lib = torch.library.Library("sptc", "FRAGMENT")
lib.define("route(Tensor scores, int active, Tensor? keep=None) -> (Tensor tokens, Tensor offsets, Tensor index)")
lib.define(f"routed_ffn({_OPERANDS}) -> (Tensor y, Tensor low_out, Tensor pre)")
lib.define(f"routed_ffn_backward(Tensor grad_y, Tensor? grad_low_out, {_OPERANDS}, Tensor pre, bool[] need) -> Tensor[]")


# Route: a choice, so it has no gradient


def _check_route(scores: Tensor, active: int, keep: Tensor | None) -> None:
    if scores.dim() != 2 or not 1 <= active <= scores.shape[1]:
        raise ValueError(f"sptc::route chooses 1 to G of scores [N, G], got active={active} of scores {list(scores.shape)}")
    if keep is not None and (keep.dtype != torch.bool or keep.dim() != 1 or keep.shape[0] != scores.shape[0]):
        raise ValueError(f"sptc::route: keep must be bool [{scores.shape[0]}], got {keep.dtype} {list(keep.shape)}")


def _route_cpu(scores: Tensor, active: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    _check_route(scores, active, keep)
    return cpu.route(scores, active, keep)


def _route_on_kernels(scores: Tensor, active: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    _check_route(scores, active, keep)
    return kernel_route.route(scores, active, keep)


def _route_fake(scores: Tensor, active: int, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    _check_route(scores, active, keep)
    entries = scores.shape[0] * active
    return (
        scores.new_empty(entries, dtype=torch.int32),
        scores.new_empty(scores.shape[1] + 1, dtype=torch.int32),
        scores.new_empty(entries, dtype=torch.int64),
    )


def _route_backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None]:
    return None, None, None


implement(lib, "route", _route_cpu, _route_on_kernels)
torch.library.register_fake("sptc::route", _route_fake, lib=lib)
torch.library.register_autograd("sptc::route", _route_backward, lib=lib)


# Routed FFN


def _check(
    x: Tensor, up: Sequence[Tensor], up_bias: Sequence[Tensor], biased: Sequence[int], low: Sequence[Tensor], up_B: Sequence[Tensor],
    adapted: Sequence[int], down: Tensor, down_A: Tensor | None, tokens: Tensor, offsets: Tensor, activation: str,
) -> None:  # fmt: skip
    arity, hidden, blocks = parse(activation).arity, down.shape[0], offsets.shape[0] - 1
    if len(up) != arity:
        raise ValueError(f"sptc::routed_ffn: {activation!r} reads {arity} up projections, got {len(up)}")
    if hidden % blocks:
        raise ValueError(f"sptc::routed_ffn: {blocks} blocks do not divide {hidden} hidden units")
    for w in up:
        if tuple(w.shape) != (hidden, x.shape[1]):
            raise ValueError(f"sptc::routed_ffn: an up weight is {list(w.shape)}, expected [{hidden}, {x.shape[1]}]")
    operands = [*up, *up_bias, *low, *up_B, down, *([] if down_A is None else [down_A])]
    if any(w.dtype != x.dtype for w in operands):
        raise TypeError(f"sptc::routed_ffn: operands are of {sorted({str(w.dtype) for w in operands})}, x of {x.dtype}; cast them to one")
    if tokens.dtype != torch.int32 or offsets.dtype != torch.int32 or not tokens.is_contiguous():
        raise TypeError(f"sptc::routed_ffn: tokens and offsets must be contiguous int32, got {tokens.dtype} and {offsets.dtype}")
    if len(biased) != len(up_bias) or not len(low) == len(up_B) == len(adapted):
        raise ValueError("sptc::routed_ffn: biased goes with up_bias, and adapted with low and up_B, one entry each")


def _forward_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, up, up_bias, biased, low, up_B, adapted, down, down_A, tokens, offsets, *_, activation = args
    _check(x, up, up_bias, biased, low, up_B, adapted, down, down_A, tokens, offsets, activation)
    return cpu.routed_ffn(*args)


def forward_on_kernels(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`sptc::routed_ffn` by launches of emitted kernels."""
    x, up, up_bias, biased, low, up_B, adapted, down, down_A, tokens, offsets, *_, activation = args
    _check(x, up, up_bias, biased, low, up_B, adapted, down, down_A, tokens, offsets, activation)
    return kernels.routed_ffn(*args)


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, up, up_bias, biased, low, up_B, adapted, down, down_A, tokens, offsets, *_, activation = args
    _check(x, up, up_bias, biased, low, up_B, adapted, down, down_A, tokens, offsets, activation)
    low_out = x.new_empty(0) if down_A is None else x.new_empty((x.shape[0], down_A.shape[0]))
    pre = x.new_empty((len(up), tokens.shape[0], down.shape[0] // (offsets.shape[0] - 1)))
    return x.new_empty((x.shape[0], down.shape[1])), low_out, pre


def _backward_fake(grad_y: Tensor, grad_low_out: Tensor | None, *args: Any) -> list[Tensor]:
    x, up, up_bias, _, low, up_B, _, down, down_A, _, _, scale, *_, need = args
    sources = [x, *up, *up_bias, *low, *up_B, down, down_A, scale]
    return [
        x.new_empty(0) if source is None or not flag else torch.empty(source.shape, dtype=source.dtype, device=source.device)
        for source, flag in zip(sources, need, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, up, up_bias, biased, low, up_B, adapted, down, down_A, tokens, offsets, scale, seed, lora_seed, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, *up, *up_bias, *low, *up_B, down, down_A, tokens, offsets, scale, seed, lora_seed, output[2])
    ctx.sizes = (len(up), len(up_bias), len(low), len(low))
    ctx.biased, ctx.adapted, ctx.rest = list(biased), list(adapted), rest


def _backward(ctx: Any, grad_y: Tensor | None, grad_low_out: Tensor | None, _grad_pre: None) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors
    lists = []
    for size in ctx.sizes:
        lists.append(list(saved[:size]))
        saved = saved[size:]
    up, up_bias, low, up_B = lists
    down, down_A, tokens, offsets, scale, seed, lora_seed, pre = saved
    wants = ctx.needs_input_grad
    need = [wants[0], *wants[1], *wants[2], *wants[4], *wants[5], wants[7], wants[8], wants[11]]
    if grad_y is None:
        grad_y = x.new_zeros((x.shape[0], down.shape[1]))
    grads = torch.ops.sptc.routed_ffn_backward(
        grad_y, grad_low_out, x, up, up_bias, ctx.biased, low, up_B, ctx.adapted, down, down_A,
        tokens, offsets, scale, seed, lora_seed, *ctx.rest, pre, need,
    )  # fmt: skip
    found = iter([grad if flag else None for grad, flag in zip(grads, need, strict=True)])
    grad_x = next(found)
    grad_up, grad_bias, grad_low, grad_B = ([next(found) for _ in range(size)] for size in ctx.sizes)
    grad_down, grad_A, grad_scale = found
    biased, adapted = ctx.biased and None, ctx.adapted and None  # torch takes an empty int[] for an empty Tensor[] and wants a list back
    return grad_x, grad_up, grad_bias, biased, grad_low, grad_B, adapted, grad_down, grad_A, None, None, grad_scale, *[None] * 5


implement(lib, "routed_ffn", _forward_cpu, forward_on_kernels)
implement(lib, "routed_ffn_backward", cpu.routed_ffn_backward, kernels.routed_ffn_backward)
torch.library.register_fake("sptc::routed_ffn", _forward_fake, lib=lib)
torch.library.register_fake("sptc::routed_ffn_backward", _backward_fake, lib=lib)
torch.library.register_autograd("sptc::routed_ffn", _backward, setup_context=_setup_context, lib=lib)
autocast.register(lib, "routed_ffn", ("x", "up", "up_bias", "low", "up_B", "down", "down_A"))
autocast.register(lib, "routed_ffn_backward", ())  # its dtypes are those of forward
