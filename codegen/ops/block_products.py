"""Products of list entries with the weights of their blocks: what a routed FFN multiplies, by the products of torch's libraries.

Entry s of the lists is a token t(s) that uses a block g(s) of hidden units; entries are in the order of blocks, those of block g being
offsets[g] to offsets[g + 1]. For entries h [L, width], tokens x [N, features] and weights w [G, width, features] there is one form,

    T(h, w, x) = sum over s of h[s] . w[g(s)] x[t(s)],

and the ops are its derivatives in h, in x and in w. So the derivatives of each are the other two, of any order.
Rows are gathered and added up one block at a time, so that they stay in the cache and no copy of all of them is ever there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import SymInt, Tensor

from sptc.codegen.ops import autocast, units
from sptc.device.products import fast, linear

_lib = torch.library.Library("sptc", "FRAGMENT")
_lib.define("gather_product(Tensor x, Tensor weight, Tensor tokens, Tensor offsets) -> Tensor")
_lib.define("scatter_product(Tensor h, Tensor weight, Tensor tokens, Tensor offsets, SymInt rows) -> Tensor")
_lib.define("outer_product(Tensor h, Tensor x, Tensor tokens, Tensor offsets) -> Tensor")
ops = torch.ops.sptc


def gather_product(x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """w[g(s)] x[t(s)] of each entry, [L, width]."""
    _check(x, weight)
    u = x.new_empty((tokens.shape[0], weight.shape[1]))
    for block, pieces in _used_blocks(offsets, x.shape[0]):
        b = fast(weight[block].t())
        for entries in pieces:
            some = _stepped(tokens[entries], x.shape[0])
            u[entries] = _multiply(x.index_select(0, some), b)[: entries.stop - entries.start]
    return u


def scatter_product(h: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """The sum of h[s] w[g(s)] over the entries of each of `rows` tokens, [rows, features]: in fp32 (fp64), in the order of blocks."""
    _check(h, weight)
    y = _sums(h, rows, weight.shape[2])
    for block, pieces in _used_blocks(offsets, rows):
        b = fast(weight[block])
        for entries in pieces:
            products = _multiply(_stepped(h[entries], rows), b)[: entries.stop - entries.start]
            y.index_add_(0, tokens[entries], products.to(y.dtype))
    return y.to(h.dtype)


def outer_product(h: Tensor, x: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """The sum of h[s] x[t(s)]^T over the entries of each block, [G, width, features]."""
    _check(h, x)
    w = h.new_zeros((offsets.shape[0] - 1, h.shape[1], x.shape[1]))
    for block, pieces in _used_blocks(offsets, x.shape[0]):
        total = _sums(h, h.shape[1], x.shape[1])
        for entries in pieces:
            some = _stepped(tokens[entries], x.shape[0])
            a = h.new_zeros(h.shape[1], some.shape[0])
            a[:, : entries.stop - entries.start] = h[entries].t()
            total += _multiply(a, x.index_select(0, some))
        w[block] = total
    return w


def grouped_gather_product(x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """`gather_product` in one product for all blocks, which is what a GPU wants."""
    a, b = x.index_select(0, tokens), weight.transpose(1, 2)
    return _grouped(a, b, offsets) if _groupable(a, b) else gather_product(x, weight, tokens, offsets)


def grouped_scatter_product(h: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """`scatter_product`, likewise. `index_put_` adds up in a fixed order on a GPU, unlike `index_add_`."""
    if not _groupable(h, weight):
        return scatter_product(h, weight, tokens, offsets, rows)
    y = _sums(h, rows, weight.shape[2])
    return y.index_put_((tokens,), _grouped(h, weight, offsets).to(y.dtype), accumulate=True).to(h.dtype)


def grouped_outer_product(h: Tensor, x: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    """`outer_product`, likewise."""
    a, b = h.t(), x.index_select(0, tokens)
    return _grouped(a, b, offsets) if _groupable(a, b) else outer_product(h, x, tokens, offsets)


def _check(a: Tensor, b: Tensor) -> None:
    if a.dtype != b.dtype:
        raise TypeError(f"products of blocks take operands of one dtype, got {a.dtype} and {b.dtype}; cast them to one")


def _sums(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_zeros((rows, columns), dtype=torch.promote_types(like.dtype, torch.float32))


def _used_blocks(offsets: Tensor, tokens: int) -> Iterator[tuple[int, list[slice]]]:
    """Each block that a token uses, and its entries, in pieces of an eighth of `tokens` (256 or more). Waits for the device.

    Pieces have few numbers of rows; shorter ones would cost products.
    """
    step = _step(tokens)
    size = step * max(2, -(-256 // step))
    for block, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if end > start:
            yield block, [slice(at, min(at + size, end)) for at in range(start, end, size)]


def _step(tokens: int) -> int:
    return max(1, tokens // units.SHARES)


def _stepped(entries: Tensor, tokens: int) -> Tensor:
    """Entries of a piece, the last one repeated until their number is one of few."""
    step = _step(tokens)
    return units.lengthened(entries, -(-entries.shape[0] // step) * step)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [k, n], which is `fast`."""
    return linear(a, b.t())


def _grouped(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return torch._grouped_mm(a, b, offs=offsets[1:]).contiguous()  # a GPU's has rows of whole 16 bytes


def _groupable(*operands: Tensor) -> bool:
    """Whether `torch._grouped_mm` takes these: rows of 16 bytes or a multiple, in a dtype of at most 32 bits."""
    return all(
        x.dtype != torch.float64 and x.numel() > 0 and 1 in x.stride() and all(s == 1 or s * x.element_size() % 16 == 0 for s in x.stride())
        for x in operands
    )


def _gather_fake(x: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    _check(x, weight)
    return x.new_empty((tokens.shape[0], weight.shape[1]))


def _scatter_fake(h: Tensor, weight: Tensor, tokens: Tensor, offsets: Tensor, rows: int | SymInt) -> Tensor:
    _check(h, weight)
    return h.new_empty((rows, weight.shape[2]))


def _outer_fake(h: Tensor, x: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
    _check(h, x)
    return h.new_empty((offsets.shape[0] - 1, h.shape[1], x.shape[1]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *lists = ctx.saved_tensors
    of_x = ops.scatter_product(grad, weight, *lists, x.shape[0]) if ctx.needs_input_grad[0] else None
    return of_x, ops.outer_product(grad, x, *lists) if ctx.needs_input_grad[1] else None, None, None


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, weight, *lists = ctx.saved_tensors
    of_h = ops.gather_product(grad, weight, *lists) if ctx.needs_input_grad[0] else None
    return of_h, ops.outer_product(h, grad, *lists) if ctx.needs_input_grad[1] else None, None, None, None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, x, *lists = ctx.saved_tensors
    of_h = ops.gather_product(x, grad, *lists) if ctx.needs_input_grad[0] else None
    return of_h, ops.scatter_product(h, grad, *lists, x.shape[0]) if ctx.needs_input_grad[1] else None, None, None


for _name, _by_blocks, _at_once, _fake, _backward, _cast in (
    ("gather_product", gather_product, grouped_gather_product, _gather_fake, _gather_backward, ("x", "weight")),
    ("scatter_product", scatter_product, grouped_scatter_product, _scatter_fake, _scatter_backward, ("h", "weight")),
    ("outer_product", outer_product, grouped_outer_product, _outer_fake, _outer_backward, ()),  # its dtypes are those of forward
):
    _lib.impl(_name, _by_blocks, "CPU")
    _lib.impl(_name, _at_once, "CUDA")
    torch.library.register_fake(f"sptc::{_name}", _fake, lib=_lib)
    torch.library.register_autograd(f"sptc::{_name}", _backward, setup_context=_save, lib=_lib)
    autocast.register(_lib, _name, _cast)
