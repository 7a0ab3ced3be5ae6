"""Schema, fake, autograd and autocast rule of the loss op. docs/design/operators.md defines it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sptc.codegen.ops import autocast
from sptc.codegen.ops.chunked_loss import accumulation_dtype, add_gradients, loss_and_gradients
from sptc.codegen.ops.returned import handed, new_handle

lib = torch.library.Library("sptc", "FRAGMENT")
lib.define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor labels, Tensor? logits, int ignored, "
    "bool mean, float smoothing, str transform, str returned, int rows, bool[] need) "
    "-> (Tensor loss, Tensor count, Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_low, Tensor grad_up, Tensor handle)",
    tags=(torch.Tag.cudagraph_unsafe,),  # it reads on the host how many labels count
)
lib.define(
    "add_gradients_of_logits_(Tensor(a!)[] grads, Tensor handle, Tensor? x, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, "
    "str returned, bool[] need) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    low, up, labels, logits, ignored, mean, smoothing, transform, _, *how = rest
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is not None and operand.dtype != x.dtype:
            raise TypeError(f"sptc::linear_cross_entropy: x is of {x.dtype}, {name} of {operand.dtype}; cast them to one dtype")
    total, count, grads = loss_and_gradients(x, weight, bias, low, up, labels, logits, ignored, smoothing, transform, *how)
    return (total / count if mean else total, count, *grads, new_handle())


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *operands, need = rest
    number = x.new_empty((), dtype=accumulation_dtype(x))
    grads = [
        x.new_empty(0) if source is None or not wanted else source.new_empty(source.shape)
        for source, wanted in zip((x, *operands[:4]), need, strict=True)
    ]
    return (number, torch.empty_like(number), *grads, x.new_empty((), dtype=torch.float64, device="cpu"))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, count, *grads, _ = output
    x, weight, bias, low, up, _, _, _, mean, _, _, returned, _, need = inputs
    asked = ctx.needs_input_grad[: len(need)]
    if unforeseen := [i for i, (wanted, known) in enumerate(zip(asked, need, strict=True)) if wanted and not known]:
        raise AssertionError(f"sptc::linear_cross_entropy: gradients of operands {unforeseen} are asked for and were not computed")
    ctx.mark_non_differentiable(*output[1 : -1 if returned else None])
    ctx.set_materialize_grads(False)
    _, of_weight, _, of_low, of_up = asked
    read = (x, weight, bias, low, up)
    if not returned:
        read = (None,) * 5
    elif returned == "u0":  # else logits are computed again
        read = (x if of_weight else None, weight, None, low if of_up else None, up if of_low else None)
    ctx.save_for_backward(count, *read, *(grad for grad, wanted in zip(grads, asked, strict=True) if wanted))
    ctx.asked, ctx.mean, ctx.inputs, ctx.returned = asked, mean, len(inputs), returned


def _backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    handle = others[-1]
    if grad_loss is None and handle is None:
        return (None,) * ctx.inputs
    count, x, weight, bias, low, up, *saved = ctx.saved_tensors
    if grad_loss is None:
        grads = [torch.zeros_like(grad) for grad in saved]
    else:
        factor = grad_loss / count.clamp(min=1) if ctx.mean else grad_loss
        # Where no label counts the mean is NaN, and so may be what it is given; gradients are zeros.
        factor = factor.where(count > 0, 0)
        grads = [grad * factor for grad in saved]
    if ctx.returned and handle is not None:
        torch.ops.sptc.add_gradients_of_logits_(grads, handle, x, weight, bias, low, up, ctx.returned, list(ctx.asked))
    left = iter(grads)
    return (*(next(left) if wanted else None for wanted in ctx.asked), *[None] * (ctx.inputs - len(ctx.asked)))


def _add_gradients_of_logits(grads: Sequence[Tensor], handle: Tensor, x: Tensor | None, weight: Tensor, *rest: Any) -> None:
    *others, need = rest
    gradient = handed(handle)
    if gradient is not None:
        left = iter(grads)
        add_gradients([next(left) if wanted else None for wanted in need], gradient.reshape(-1, weight.shape[0]), x, weight, *others)


for _key in ("CPU", "CUDA"):
    lib.impl("linear_cross_entropy", _forward, _key)
    lib.impl("add_gradients_of_logits_", _add_gradients_of_logits, _key)
torch.library.register_fake("sptc::linear_cross_entropy", _fake, lib=lib)
torch.library.register_fake("sptc::add_gradients_of_logits_", lambda *_: None, lib=lib)
torch.library.register_autograd("sptc::linear_cross_entropy", _backward, setup_context=_setup_context, lib=lib)
autocast.register(lib, "linear_cross_entropy", ())  # who writes the op casts its operands to the dtype of the product that it replaces
