"""Schema, fake, autograd and autocast rule of the loss op. docs/design/operators.md defines it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sptc.codegen.ops import autocast
from sptc.codegen.ops.chunked_loss import accumulation_dtype, loss_and_gradients

lib = torch.library.Library("sptc", "FRAGMENT")
lib.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor labels, int ignored, bool mean, "
    "float smoothing, str transform, int rows, bool[] need) "
    "-> (Tensor loss, Tensor count, Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_low, Tensor grad_up)",
    tags=(torch.Tag.cudagraph_unsafe,),  # it reads on the host how many labels count
)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    low, up, labels, ignored, mean, *how = rest
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and operand.dtype != x.dtype:
            raise TypeError(f"sptc::linear_cross_entropy: x is of {x.dtype}, {name} of {operand.dtype}; cast them to one dtype")
    total, count, grads = loss_and_gradients(x, weight, bias, low, up, labels, ignored, *how)
    return (total / count if mean else total, count, *grads)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *operands, need = rest
    number = x.new_empty((), dtype=accumulation_dtype(x))
    grads = [
        x.new_empty(0) if source is None or not wanted else source.new_empty(source.shape)
        for source, wanted in zip((x, *operands[:4]), need, strict=True)
    ]
    return (number, torch.empty_like(number), *grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    count, *grads = output[1:]
    *_, mean, _smoothing, _transform, _rows, need = inputs
    asked = ctx.needs_input_grad[: len(need)]
    if unforeseen := [i for i, (wanted, known) in enumerate(zip(asked, need, strict=True)) if wanted and not known]:
        raise AssertionError(f"sptc::linear_cross_entropy: gradients of operands {unforeseen} are asked for and were not computed")
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(count, *(grad for grad, wanted in zip(grads, asked, strict=True) if wanted))
    ctx.asked, ctx.mean, ctx.inputs = asked, mean, len(inputs)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * ctx.inputs
    count, *saved = ctx.saved_tensors
    factor = grad_loss / count.clamp(min=1) if ctx.mean else grad_loss
    # Where no label counts the mean is NaN, and so may be what it is given; gradients are zeros.
    factor = factor.where(count > 0, 0)
    left = iter(saved)
    grads = [next(left) * factor if wanted else None for wanted in ctx.asked]
    return (*grads, *[None] * (ctx.inputs - len(grads)))


for _key in ("CPU", "CUDA"):
    lib.impl("linear_cross_entropy", _forward, _key)
torch.library.register_fake("sptc::linear_cross_entropy", _fake, lib=lib)
torch.library.register_autograd("sptc::linear_cross_entropy", _backward, setup_context=_setup_context, lib=lib)
autocast.register(lib, "linear_cross_entropy", ())  # who writes the op casts its operands to the dtype of the product that it replaces
