"""Products of gathered rows, added to scattered rows: what the routed FFN is made of on a CPU.

fp32 and fp64 run in native/products.cpp, which reads and writes the rows where they lie. 16-bit dtypes run in torch's own products, which
use the processor's instructions for them, on gathered copies.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sptc.codegen.cpu.compiler import REAL, native


@dataclass(frozen=True)
class Term:
    """One product: rows `index` of `a` [.., depth] (all of them in order if None), times `w` [depth, columns] of any strides."""

    a: Tensor
    w: Tensor
    index: Tensor | None = None  # int32 [rows]


class _Term(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("a_row", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("w_row", "w_column", "depth")),
    ]


class _Call(ctypes.Structure):
    """`Call` of native/products.cpp."""

    _fields_ = [
        ("terms", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "rows", "columns")),
        ("start", ctypes.c_void_p),
        ("add", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_row", ctypes.c_int64),
        ("index", ctypes.c_void_p),
    ]


def multiply(out: Tensor, terms: Sequence[Term], bias: Tensor | None = None) -> None:
    """out [rows, columns] = bias + the sum of `terms`, in one thread. `out` may be fp32 for 16-bit terms."""
    if terms[0].a.dtype in REAL:
        _native(out, terms, len(out), bias=bias)
        return
    total = sum(_rows(term) @ term.w for term in terms)
    torch.add(total, 0 if bias is None else bias, out=out)


def add_rows(total: Tensor, index: Tensor, terms: Sequence[Term]) -> None:
    """total[index] += the sum of `terms`, in one thread; `index` int32, its entries distinct. `total` is fp32 for 16-bit terms."""
    if terms[0].a.dtype in REAL:
        _native(total, terms, len(index), index=index)
        return
    for term in terms:
        total.index_add_(0, index, (_rows(term) @ term.w).to(total.dtype))


def _rows(term: Term) -> Tensor:
    return term.a if term.index is None else term.a.index_select(0, term.index)


def _native(out: Tensor, terms: Sequence[Term], rows: int, bias: Tensor | None = None, index: Tensor | None = None) -> None:
    kept = [Term(_adjacent(term.a), term.w, term.index) for term in terms]
    listed = (_Term * len(kept))(
        *(
            _Term(
                t.a.data_ptr(), t.a.stride(0), None if t.index is None else t.index.data_ptr(), t.w.data_ptr(), *t.w.stride(), t.w.shape[0]
            )
            for t in kept
        )
    )
    bias = None if bias is None else bias.contiguous()
    call = _Call(
        ctypes.addressof(listed), len(kept), rows, out.shape[1], None if bias is None else bias.data_ptr(), index is not None,
        out.data_ptr(), out.stride(0), None if index is None else index.data_ptr(),
    )  # fmt: skip
    native("products", **REAL[out.dtype]).multiply_rows(ctypes.byref(call))


def _adjacent(a: Tensor) -> Tensor:
    return a if a.stride(1) == 1 or a.shape[1] == 1 else a.contiguous()
