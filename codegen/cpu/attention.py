"""Sparse attention on a CPU: `sptc::sparse_attention` and its backward, computed by native/attention.cpp.

Threads share the work by (batch row, key head) pairs, a call of the native code each, which goes through the pair's block lists with all
its buffers in the cache. All arithmetic is fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sptc.codegen.cpu.compiler import REAL, native
from sptc.codegen.cpu.mask import CpuMask
from sptc.codegen.cpu.parallel import share, worker_count
from sptc.codegen.cpu.predicate_source import Fill, fill
from sptc.codegen.cpu.transform_source import transform


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
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "n", "m", "d", "d_v", "query_block", "key_block", "tiles", "width")),
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
        *((name, ctypes.c_void_p) for name in ("out", "lse", "grad_out")),
        ("grad_step", _STRIDES),
        *((name, ctypes.c_void_p) for name in ("grad_q", "grad_k", "grad_v")),
    ]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [b, h, n, d_v] in the dtype of q, lse [b, h, n] in the dtype of arithmetic."""
    prepared = _Prepared(call)
    v = prepared.v
    out = torch.empty((*call.q.shape[:3], v.shape[-1]), dtype=call.dtype)
    lse = torch.empty(call.q.shape[:3], dtype=call.dtype)
    prepared.run(False, out=out, lse=lse)
    return _cut(out, call.v, call.q.dtype), lse


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, need: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, those without need as empty tensors of shape [0]. The scores are computed anew."""
    prepared = _Prepared(call)
    grad, out = prepared.ready(grad_out), prepared.ready(out).contiguous()
    sources = prepared.q, prepared.k, prepared.v
    grads = [torch.empty(x.shape, dtype=call.dtype) if wanted else None for x, wanted in zip(sources, need, strict=True)]
    named = {f"grad_{name}": g for name, g in zip("qkv", grads, strict=True) if g is not None}
    prepared.run(True, out=out, lse=lse.contiguous(), grad_out=grad, **named)
    del (
        prepared,
        sources,
        grad,
        out,
        named,
    )  # copies in fp32 of operands in 16 bits: beside them the gradients' would make the most of a step
    results = []
    for x in (call.q, call.k, call.v):
        whole = grads.pop(0)
        results.append(x.new_empty(0) if whole is None else _cut(whole, x, x.dtype))
    grad_q, grad_k, grad_v = results
    return grad_q, grad_k, grad_v


class _Prepared:
    """A call with every operand as the native code reads it. It keeps what it points to alive."""

    def __init__(self, call: Call) -> None:
        self.call, mask = call, call.mask
        self.library = native("attention", **REAL[call.dtype])
        self.lanes: int = self.library.lanes()
        self.q, self.k, self.v = (self.ready(x) for x in (call.q, call.k, call.v))
        self.ids, self.counts = call.ids.contiguous(), call.counts.contiguous()
        self.key_bias = mask.key_bias(call.dtype)
        self.certain = mask.certain_pairs()
        self.boolean, self.bias = mask.element_boolean, mask.element_bias(call.dtype)
        predicate = mask.element_predicate
        self.transform = None if call.transform == "u0" else transform(call.transform, call.dtype)
        self.fill: Fill | None = None if predicate is None else fill(predicate, mask.tensors, mask.sizes)

    def ready(self, x: Tensor) -> Tensor:
        """`x` in the dtype of arithmetic, its rows adjacent numbers, as many as fill vectors."""
        x = x.to(self.call.dtype)
        if x.shape[-1] % self.lanes:
            return pad(x, (0, -x.shape[-1] % self.lanes))
        return x if x.stride(-1) == 1 else x.contiguous()

    def run(self, backward: bool, **tensors: Tensor) -> None:
        call, mask = self.call, self.call.mask
        native_call = _Call(
            q_step=_steps(self.q), k_step=_steps(self.k), v_step=_steps(self.v),
            heads=mask.h, key_heads=mask.h_kv, n=mask.n, m=mask.m, d=self.q.shape[-1], d_v=self.v.shape[-1],
            query_block=mask.query_block, key_block=mask.key_block, tiles=self.ids.shape[2], width=self.ids.shape[3], scale=call.scale,
            boolean=_operand(self.boolean), bias=_operand(self.bias), dropout_p=call.dropout_p,
            drops=call.seed is not None and call.dropout_p > 0, seed=0 if call.seed is None else int(call.seed),
        )  # fmt: skip
        for name, x in {"q": self.q, "k": self.k, "v": self.v, "ids": self.ids, "counts": self.counts, **tensors}.items():
            setattr(native_call, name, x.data_ptr())
        if self.key_bias is not None:
            self.key_bias = self.key_bias.contiguous()
            native_call.key_bias, native_call.key_bias_strides = self.key_bias.data_ptr(), _broadcast(self.key_bias, 2)
        if self.certain is not None:
            self.certain = self.certain.contiguous()
            native_call.certain, native_call.certain_strides = self.certain.data_ptr(), _broadcast(self.certain, 2)
        if self.transform is not None:
            native_call.transform = ctypes.cast(self.transform, ctypes.c_void_p).value
        if self.fill is not None:
            native_call.fill = ctypes.cast(self.fill.function, ctypes.c_void_p).value
            native_call.fill_operands = ctypes.addressof(self.fill.operands)
        if "grad_out" in tensors:
            native_call.grad_step = _steps(tensors["grad_out"])
        pairs = mask.b * mask.h_kv
        step = max(1, pairs // (4 * worker_count()))

        def work(spans: Iterator[int]) -> None:
            for start in spans:
                self.library.attend(
                    ctypes.byref(native_call), ctypes.c_int64(start), ctypes.c_int64(min(start + step, pairs)), ctypes.c_int64(backward)
                )

        share(range(0, pairs, step), work)


def _steps(x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return _STRIDES(*x.stride()[:3])


def _broadcast(x: Tensor, axes: int) -> ctypes.Array[ctypes.c_int64]:
    """Strides of the first axes, 0 where an axis of size 1 stands for all."""
    return (ctypes.c_int64 * axes)(*(0 if size == 1 else stride for size, stride in zip(x.shape[:axes], x.stride(), strict=False)))


def _operand(x: Tensor | None) -> _Operand:
    return _Operand() if x is None else _Operand(x.data_ptr(), _broadcast(x, 4))


def _cut(x: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in this dtype and without the padding of its rows, contiguous."""
    return x[..., : like.shape[-1]].contiguous().to(dtype)
