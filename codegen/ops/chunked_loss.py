"""The cross entropy of projected rows, some rows at a time, and every gradient with it, so that the logits never stand in memory whole.

Plain torch on any device: products are the library's, and what is between them passes over one buffer of a few rows. Gradients are those
of the sum of the losses; what the sum is divided by, and what the loss is multiplied with, they are multiplied with in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sptc.codegen.ops import units
from sptc.ir import expression

_U0 = expression.U0


def loss_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None, labels: Tensor, given: Tensor | None,
    ignored: int, smoothing: float, transform: str, rows: int, need: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The sum of the losses, how many there are (both numbers in fp32, or fp64 for fp64), and the gradients of x, weight, bias, low, up.

    Arguments as of `sptc::linear_cross_entropy`; `given` are its logits. A gradient that is not needed is an empty tensor of shape [0].
    """
    counted = (labels != ignored).nonzero().squeeze(1)
    function = expression.parse(transform)
    single = accumulation_dtype(x)
    sources = (x, weight, bias, low, up)
    summed = (False, True, True, False, True)  # over chunks, in fp32; of rows each chunk writes its own
    grads = [
        torch.zeros(source.shape, dtype=single if wide else source.dtype, device=x.device) if source is not None and wanted else None
        for source, wanted, wide in zip(sources, need, summed, strict=True)
    ]
    grad_x, grad_weight, grad_bias, grad_low, grad_up = grads
    total = torch.zeros((), dtype=single, device=x.device)
    for chunk, some, part, products, logits in _chunks(x, weight, bias, low, up, given, counted, rows, single):
        scores = logits if function == _U0 else expression.evaluate(function, logits)
        slope = None if function == _U0 else expression.evaluate(expression.derivative(function), logits)
        total += _to_gradient(scores[: len(chunk)], labels.index_select(0, chunk), smoothing)
        if slope is not None:
            scores *= slope
        scores[len(chunk) :] = 0
        narrow = scores if products is logits else products.copy_(scores)  # as the product was given, its gradient is taken
        if grad_x is not None:
            grad_x.index_copy_(0, chunk, (narrow @ weight)[: len(chunk)])
        if grad_weight is not None:
            _add_product(grad_weight, narrow.t(), part)
        if grad_bias is not None:
            grad_bias += scores.sum(0)
        if low is not None and up is not None:
            adapted = scores if low.dtype == single else narrow.to(low.dtype)
            if grad_low is not None:
                grad_low.index_copy_(0, chunk, (adapted @ up)[: len(chunk)])
            if grad_up is not None:
                _add_product(grad_up, adapted.t(), low.index_select(0, some))
    count = torch.full((), counted.shape[0], dtype=single, device=x.device)
    return total, count, [
        x.new_empty(0) if grad is None or source is None else grad.to(source.dtype) for grad, source in zip(grads, sources, strict=True)
    ]  # fmt: skip


def add_gradients(
    grads: Sequence[Tensor | None], gradient: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, low: Tensor | None,
    up: Tensor | None, returned: str,
) -> None:  # fmt: skip
    """Add to the gradients of x, weight, bias, low, up, where there are any, what `gradient` [N, classes] gives, of a function of logits.

    Operands that are not needed may be None; where it is a function, logits are computed again and all are needed.
    """
    grad_x, grad_weight, grad_bias, grad_low, grad_up = grads
    if returned != "u0" and x is not None:
        single = accumulation_dtype(x)
        logits = torch.nn.functional.linear(x, weight, bias).to(single)
        if low is not None and up is not None:
            _add_product(logits, low, up.t())
        gradient = gradient.to(single) * expression.evaluate(expression.derivative(expression.parse(returned)), logits)
    narrow = gradient.to(weight.dtype)
    if grad_x is not None:
        grad_x += narrow @ weight
    if grad_weight is not None and x is not None:
        grad_weight += narrow.t() @ x
    if grad_bias is not None:
        grad_bias += gradient.sum(0)
    if grad_low is not None and up is not None:
        grad_low += gradient.to(up.dtype) @ up
    if grad_up is not None and low is not None:
        grad_up += gradient.to(low.dtype).t() @ low


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What sums and logarithms of rows like x are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None, given: Tensor | None,
    counted: Tensor, rows: int, single: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Row numbers, the same with more, rows of x, their products with the weight as these come, and their logits in the accumulation dtype.

    The last chunk repeats its last row until it has a multiple of an eighth of `rows` (`units.SHARES`).
    The last two are buffers, or one, that the next chunk overwrites.
    """
    step = max(1, rows // 8)
    most = min(rows, -(-counted.shape[0] // step) * step)
    buffer = torch.empty(most, weight.shape[0], dtype=x.dtype, device=x.device)
    wide = buffer if x.dtype == single else torch.empty_like(buffer, dtype=single)
    for chunk in counted.split(rows):
        some = units.lengthened(chunk, min(-(-len(chunk) // step) * step, rows))
        part, products, logits = x.index_select(0, some), buffer[: len(some)], wide[: len(some)]
        if given is not None:
            logits.copy_(given.index_select(0, some))
        else:
            if bias is None:
                torch.mm(part, weight.t(), out=products)
            else:
                torch.addmm(bias, part, weight.t(), out=products)
            if products is not logits:
                logits.copy_(products)
            if low is not None and up is not None:
                _add_product(logits, low.index_select(0, some), up.t())
        yield chunk, some, part, products, logits


def _to_gradient(scores: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The sum of the losses of `scores` [n, classes], which become their gradient, softmax minus target."""
    labels = labels[:, None]
    most = scores.amax(1, keepdim=True)
    aimed = scores.gather(1, labels)
    if smoothing:
        aimed = (1 - smoothing) * aimed + smoothing * scores.mean(1, keepdim=True)
    scores.sub_(most).exp_()
    sums = scores.sum(1, keepdim=True)
    loss = (sums.log() + most - aimed).sum()
    scores.div_(sums)
    if smoothing:
        scores.sub_(smoothing / scores.shape[1])
    scores.scatter_(1, labels, scores.gather(1, labels) - (1 - smoothing))  # not scatter_add_, of whose order a GPU makes no promise
    return loss


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """to += a b, summed in the dtype of `to`. On a GPU, where wide products are slow, one of narrow terms is rounded to their dtype."""
    if to.dtype == a.dtype or to.device.type == "cpu":
        to.addmm_(a.to(to.dtype), b.to(to.dtype))
    else:
        to += a @ b
