"""Sparse attention on a CPU: `sptc::sparse_attention` and its backward, computed by native/attention.cpp.

Threads share the work by (batch row, key head) pairs, some in a call of the native code, which goes through a pair's block lists with all
its buffers in the cache. Arithmetic is fp32, or fp64 for fp64 inputs; operands in bf16 are multiplied as they are where the processor can.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sptc.codegen.cpu.compiler import REAL, native
from sptc.codegen.cpu.mask import CpuMask
from sptc.codegen.cpu.parallel import share, worker_count
from sptc.codegen.cpu.predicate_source import fill
from sptc.codegen.cpu.transform_source import transform
from sptc.codegen.reference.layout import empty_rows


def default_blocks(n: int, m: int, density: float, own: bool = False) -> tuple[int, int]:
    """(query_block, key_block) for n queries and m keys on a CPU, the same for tiles that own blocks and others.

    Small tiles choose better, look ahead less and cost time, much below 32 queries. A causal tile spends as many of the kept keys on itself
    as it has queries: at most half of them in tiles of 32, a quarter in those of 64 (docs/quality.md); tiles of 16 are the least.
    """
    kept = max(1, math.ceil(density * m))
    half = 1 << max(0, (kept // 2).bit_length() - 1)  # the greatest power of two in L / 2
    query_block = min(64, max(16, min(half, 32), half // 2))
    key_block = 16 if query_block > 16 else 8
    return min(query_block, max(n, 1)), min(key_block, max(m, 1))


@dataclass(frozen=True)
class Call:
    """What forward and backward share."""

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    counts: Tensor
    mask: CpuMask
    seed: Tensor | None
    dropout_p: float
    scale: float
    transform: str = "u0"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


_STRIDES = ctypes.c_int64 * 3  # of batch row, head and row; within a row elements are adjacent


class _Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]


class _Call(ctypes.Structure):
    """`Call` of native/attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((f"{name}_step", _STRIDES) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("ids", "counts")),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "n", "m", "size", "size_v", "d", "d_v")),
        *((name, ctypes.c_int64) for name in ("query_block", "key_block", "tiles", "width")),
        ("scale", ctypes.c_double),
        ("transform", ctypes.c_void_p),
        ("key_bias", ctypes.c_void_p),
        ("key_bias_strides", ctypes.c_int64 * 2),
        ("certain", ctypes.c_void_p),
        ("certain_strides", ctypes.c_int64 * 2),
        ("fill", ctypes.c_void_p),
        ("fill_operands", ctypes.c_void_p),
        ("boolean", _Operand),
        ("bias", _Operand),
        ("dropout_p", ctypes.c_double),
        ("seed", ctypes.c_int64),
        ("drops", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("out", "grad_out", "grad_q", "grad_k", "grad_v")),
        *((f"{name}_step", _STRIDES) for name in ("out", "grad_out", "grad_q", "grad_k", "grad_v")),
    ]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [b, h, n, d_v] in the dtype of q, heads of a position together, lse [b, h, n] in the dtype of arithmetic."""
    if not _native(call):
        out, lse = forward(_widened(call))
        return out.to(call.q.dtype), lse
    out = empty_rows(call.q, (*call.q.shape[:3], call.v.shape[-1]))
    lse = torch.empty(call.q.shape[:3], dtype=call.dtype)
    _run(call, lse, {"out": out})
    return out, lse


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, need: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, heads of a position together, those without need of shape [0]. The scores are computed anew."""
    sources = (call.q, call.k, call.v)
    if not _native(call):
        wide = backward(_widened(call), grad_out, out, lse, need)
        grad_q, grad_k, grad_v = (grad.to(x.dtype) for grad, x in zip(wide, sources, strict=True))
        return grad_q, grad_k, grad_v
    grads = [empty_rows(x, x.shape) if wanted else x.new_empty(0) for x, wanted in zip(sources, need, strict=True)]
    results = {f"grad_{name}": g for name, g, wanted in zip("qkv", grads, need, strict=True) if wanted}
    _run(call, lse.contiguous(), {"out": _rows(out, call), "grad_out": _rows(grad_out, call), **results}, backward=True)
    grad_q, grad_k, grad_v = grads
    return grad_q, grad_k, grad_v


def _native(call: Call) -> bool:
    """Whether the native code reads and writes these dtypes."""
    return call.q.dtype in REAL and call.k.dtype == call.v.dtype == call.q.dtype


def _widened(call: Call) -> Call:
    """The call with operands in the dtype of arithmetic."""
    return replace(call, q=call.q.to(call.dtype), k=call.k.to(call.dtype), v=call.v.to(call.dtype))


def _rows(x: Tensor, call: Call) -> Tensor:
    """`x` in the dtype of q, the numbers of its rows adjacent."""
    x = x.to(call.q.dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _run(call: Call, lse: Tensor, more: dict[str, Tensor], backward: bool = False) -> None:
    """Call the native code for all pairs; `more` are operands and results [b, h or h_kv, ...] by their names in its `Call`."""
    mask, library = call.mask, native("attention", **REAL[call.q.dtype])
    lanes: int = library.lanes()
    # What the native code reads has a name here, which keeps it alive.
    ids, counts = call.ids.contiguous(), call.counts.contiguous()
    key_bias, certain = mask.key_bias(call.dtype), mask.certain_pairs()
    boolean, bias = mask.element_boolean, mask.element_bias(call.dtype)
    predicate = mask.element_predicate
    changed = None if call.transform == "u0" else transform(call.transform, call.dtype)
    filled = None if predicate is None else fill(predicate, mask.tensors, mask.sizes)
    operands = {name: _rows(getattr(call, name), call) for name in ("q", "k", "v")} | more
    native_call = _Call(
        ids=ids.data_ptr(), counts=counts.data_ptr(), lse=lse.data_ptr(),
        heads=mask.h, key_heads=mask.h_kv, n=mask.n, m=mask.m, size=call.q.shape[-1], size_v=call.v.shape[-1],
        d=-(-call.q.shape[-1] // lanes) * lanes, d_v=-(-call.v.shape[-1] // lanes) * lanes,
        query_block=mask.query_block, key_block=mask.key_block, tiles=ids.shape[2], width=ids.shape[3], scale=call.scale,
        boolean=_operand(boolean), bias=_operand(bias), dropout_p=call.dropout_p,
        drops=call.seed is not None and call.dropout_p > 0, seed=0 if call.seed is None else int(call.seed),
    )  # fmt: skip
    for name, x in operands.items():
        setattr(native_call, name, x.data_ptr())
        setattr(native_call, f"{name}_step", _STRIDES(*x.stride()[:3]))
    if key_bias is not None:
        key_bias = key_bias.contiguous()
        native_call.key_bias, native_call.key_bias_strides = key_bias.data_ptr(), _broadcast(key_bias, 2)
    if certain is not None:
        certain = certain.contiguous()
        native_call.certain, native_call.certain_strides = certain.data_ptr(), _broadcast(certain, 2)
    if changed is not None:
        native_call.transform = ctypes.cast(changed, ctypes.c_void_p).value
    if filled is not None:
        native_call.fill = ctypes.cast(filled.function, ctypes.c_void_p).value
        native_call.fill_operands = ctypes.addressof(filled.operands)
    pairs = mask.b * mask.h_kv
    step = max(1, pairs // (4 * worker_count()))

    def work(starts: Iterator[int]) -> None:
        for start in starts:
            stop = min(start + step, pairs)
            library.attend(ctypes.byref(native_call), ctypes.c_int64(start), ctypes.c_int64(stop), ctypes.c_int64(backward))
        library.release()

    share(range(0, pairs, step), work)


def _broadcast(x: Tensor, axes: int) -> ctypes.Array[ctypes.c_int64]:
    """Strides of the first axes, 0 where an axis of size 1 stands for all."""
    return (ctypes.c_int64 * axes)(*(0 if size == 1 else stride for size, stride in zip(x.shape[:axes], x.stride(), strict=False)))


def _operand(x: Tensor | None) -> _Operand:
    return _Operand() if x is None else _Operand(x.data_ptr(), _broadcast(x, 4))
