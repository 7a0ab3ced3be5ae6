"""The op that computes a function of rows some rows at a time, and every gradient too: what is in between never stands in memory whole.

The function, and its gradients, are programs of ATen operators (`sptc/ir/program.py`), which nothing fuses: products are the library's, and
what is between them passes over rows that are still in the cache. What depends on no row is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sptc.codegen.ops import autocast
from sptc.ir.program import Parts, parse

_lib = torch.library.Library("sptc", "FRAGMENT")
_lib.define(
    "in_chunks(Tensor[] rows, Tensor[] others, str forward, str backward, int width, ScalarType dtype, int chunk, bool[] need) -> Tensor"
)
_lib.define("in_chunks_backward(Tensor grad, Tensor[] rows, Tensor[] others, str backward, int chunk, bool[] need) -> Tensor[]")


def in_chunks(
    rows: Sequence[Tensor], others: Sequence[Tensor], forward: str, backward: str, width: int, dtype: torch.dtype, chunk: int, need: Any
) -> Tensor:
    """The values [N, width] of a function of rows, each [N, ...], and of others; `chunk` rows at a time."""
    y = rows[0].new_empty((rows[0].shape[0], width), dtype=dtype)
    parts = Parts(parse(forward), len(rows), others)
    for to, *part in zip(*(x.split(chunk) for x in (y, *rows)), strict=True):
        to.copy_(parts.run(*part)[0])
    return y


def in_chunks_backward(
    grad: Tensor, rows: Sequence[Tensor], others: Sequence[Tensor], backward: str, chunk: int, need: Sequence[bool]
) -> list[Tensor]:
    """The gradients of rows and others; one that is not needed is an empty tensor of shape [0].

    Those of others are sums over chunks, in fp32 (fp64).
    """
    of_rows = [x.new_empty(x.shape) if wanted else None for x, wanted in zip(rows, need, strict=False)]
    sums: list[Tensor | None] = [None] * sum(need[len(rows) :])
    kept = [x for x in of_rows if x is not None]
    parts = Parts(parse(backward), 1 + len(rows), others)
    for start in range(0, max(1, rows[0].shape[0]), chunk):
        found = parts.run(*(x[start : start + chunk] for x in (grad, *rows)))
        for of_row, part in zip(kept, found, strict=False):
            of_row[start : start + chunk].copy_(part)
        for i, part in enumerate(found[len(kept) :]):
            total = sums[i]
            sums[i] = part.to(_wide(part)) if total is None else total.add_(part)
        del found
    left = iter(sums)
    of_others = [
        total.to(x.dtype) if wanted and (total := next(left)) is not None else None
        for x, wanted in zip(others, need[len(rows) :], strict=True)
    ]
    return [grad.new_empty(0) if found is None else found for found in (*of_rows, *of_others)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(
    rows: Sequence[Tensor], others: Sequence[Tensor], forward: str, backward: str, width: int, dtype: torch.dtype, chunk: int, need: Any
) -> Tensor:
    return rows[0].new_empty((rows[0].shape[0], width), dtype=dtype)


def _backward_fake(
    grad: Tensor, rows: Sequence[Tensor], others: Sequence[Tensor], backward: str, chunk: int, need: Sequence[bool]
) -> list[Tensor]:
    return [x.new_empty(x.shape) if wanted else grad.new_empty(0) for x, wanted in zip((*rows, *others), need, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, others, _, ctx.backward, _, _, ctx.chunk, ctx.need = inputs
    ctx.rows = len(rows)
    ctx.save_for_backward(*rows, *others)
    asked = pytree.tree_leaves(ctx.needs_input_grad)[: len(ctx.need)]  # lists are flat here, and not in backward
    if unforeseen := [i for i, (wanted, known) in enumerate(zip(asked, ctx.need, strict=True)) if wanted and not known]:
        raise AssertionError(f"sptc::in_chunks: gradients of operands {unforeseen} are asked for and are not in its program")


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, others = ctx.saved_tensors[: ctx.rows], ctx.saved_tensors[ctx.rows :]
    found = torch.ops.sptc.in_chunks_backward(grad, list(rows), list(others), ctx.backward, ctx.chunk, ctx.need)
    grads = [x if wanted else None for x, wanted in zip(found, ctx.need, strict=True)]
    return grads[: ctx.rows], grads[ctx.rows :], *[None] * 6


for _name, _function, _of_fakes in (("in_chunks", in_chunks, _fake), ("in_chunks_backward", in_chunks_backward, _backward_fake)):
    for _key in ("CPU", "CUDA"):
        _lib.impl(_name, _function, _key)
    torch.library.register_fake(f"sptc::{_name}", _of_fakes, lib=_lib)
    autocast.register(_lib, _name, ())  # its programs have their casts in them
torch.library.register_autograd("sptc::in_chunks", _backward, setup_context=_setup_context, lib=_lib)
