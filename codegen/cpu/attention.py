"""Sparse attention on a CPU: `sptc::sparse_attention` and its backward, computed by native/attention.cpp.

Threads share the work by (batch row, key head) pairs, some in a call of the native code, which goes through a pair's block lists with all
its buffers in the cache. All arithmetic is fp32, or fp64 for fp64 inputs: operands in 16 bits are copied, and results rounded, for the
heads of one call at a time.
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


_STRIDES = ctypes.c_int64 * 3  # of batch row, head and row, for what is not contiguous; within a row elements are adjacent


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
        ("lse", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("out", "grad_out", "grad_q", "grad_k", "grad_v")),
        *((f"{name}_step", _STRIDES) for name in ("out", "grad_out", "grad_q")),
    ]


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out [b, h, n, d_v] in the dtype of q, heads of a position together, lse [b, h, n] in the dtype of arithmetic."""
    out = empty_rows(call.q, (*call.q.shape[:3], call.v.shape[-1]))
    lse = torch.empty(call.q.shape[:3], dtype=call.dtype)
    _Prepared(call, lse, {"q": call.q, "k": call.k, "v": call.v}, {"out": out}).run()
    return out, lse


def backward(call: Call, grad_out: Tensor, out: Tensor, lse: Tensor, need: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, heads of a position together, those without need of shape [0]. The scores are computed anew."""
    sources = {"q": call.q, "k": call.k, "v": call.v}
    grads = [empty_rows(x, x.shape) if wanted else x.new_empty(0) for x, wanted in zip(sources.values(), need, strict=True)]
    results = {f"grad_{name}": g for name, g, wanted in zip("qkv", grads, need, strict=True) if wanted}
    _Prepared(call, lse.contiguous(), {**sources, "out": out, "grad_out": grad_out}, results).run(backward=True)
    grad_q, grad_k, grad_v = grads
    return grad_q, grad_k, grad_v


_OF_KEYS = ("k", "v", "grad_k", "grad_v")  # a row for each key; all others for each query
_SUMS = ("grad_k", "grad_v")  # contiguous: every tile adds to their rows, which lie in the cache so; all others are strided


class _Prepared:
    """A call with every operand as the native code reads it. It keeps what it points to alive."""

    def __init__(self, call: Call, lse: Tensor, operands: dict[str, Tensor], results: dict[str, Tensor]) -> None:
        """Operands and results [b, h or h_kv, ...], both in any dtype, by their names in `Call` of attention.cpp."""
        self.call, mask, self.lse = call, call.mask, lse
        self.operands, self.results = operands, results
        self.library = native("attention", **REAL[call.dtype])
        self.lanes: int = self.library.lanes()
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

    def run(self, backward: bool = False) -> None:
        mask, whole = self.call.mask, self._whole()
        step = max(1, mask.b * mask.h_kv // (4 * worker_count()))
        spans = [(row, head, min(head + step, mask.h_kv)) for row in range(mask.b) for head in range(0, mask.h_kv, step)]
        of_all = None if self._copies() else self._part(whole, slice(0, mask.b), slice(0, mask.h_kv))

        def work(spans: Iterator[tuple[int, int, int]]) -> None:
            for row, first, last in spans:
                part = of_all or self._part(whole, slice(row, row + 1), slice(first, last))
                pairs = (ctypes.c_int64(row * mask.h_kv + head) for head in (first, last))
                self.library.attend(ctypes.byref(part.call), *pairs, ctypes.c_int64(backward))
                part.round()
                del part  # before the next one takes memory

        share(spans, work)

    def _copies(self) -> bool:
        """Whether native code can't read all operands, and write all results, where they are."""
        return not all(self._direct(name, x) for name, x in (*self.operands.items(), *self.results.items()))

    def _whole(self) -> _Call:
        """What all spans of heads have in common."""
        call, mask = self.call, self.call.mask
        whole = _Call(
            ids=self.ids.data_ptr(), counts=self.counts.data_ptr(), lse=self.lse.data_ptr(),
            heads=mask.h, key_heads=mask.h_kv, n=mask.n, m=mask.m, d=self._padded(call.q), d_v=self._padded(call.v),
            query_block=mask.query_block, key_block=mask.key_block, tiles=self.ids.shape[2], width=self.ids.shape[3], scale=call.scale,
            boolean=_operand(self.boolean), bias=_operand(self.bias), dropout_p=call.dropout_p,
            drops=call.seed is not None and call.dropout_p > 0, seed=0 if call.seed is None else int(call.seed),
        )  # fmt: skip
        if self.key_bias is not None:
            self.key_bias = self.key_bias.contiguous()
            whole.key_bias, whole.key_bias_strides = self.key_bias.data_ptr(), _broadcast(self.key_bias, 2)
        if self.certain is not None:
            self.certain = self.certain.contiguous()
            whole.certain, whole.certain_strides = self.certain.data_ptr(), _broadcast(self.certain, 2)
        if self.transform is not None:
            whole.transform = ctypes.cast(self.transform, ctypes.c_void_p).value
        if self.fill is not None:
            whole.fill = ctypes.cast(self.fill.function, ctypes.c_void_p).value
            whole.fill_operands = ctypes.addressof(self.fill.operands)
        return whole

    def _padded(self, x: Tensor) -> int:
        return -(-x.shape[-1] // self.lanes) * self.lanes

    def _direct(self, name: str, x: Tensor) -> bool:
        lies_well = x.is_contiguous() if name in _SUMS else x.stride(-1) == 1
        return lies_well and x.dtype == self.call.dtype and x.shape[-1] == self._padded(x)

    def _part(self, whole: _Call, rows: slice, heads: slice) -> _Part:
        """The call for some batch rows and key heads, copies of theirs alone."""
        here, mask = _Call.from_buffer_copy(whole), self.call.mask
        of_queries = slice(heads.start * mask.h // mask.h_kv, heads.stop * mask.h // mask.h_kv)
        parts, rounded = dict[str, Tensor](), list[tuple[Tensor, Tensor]]()
        for name, x in (*self.operands.items(), *self.results.items()):
            part = x[rows, heads if name in _OF_KEYS else of_queries]
            if name not in self.results:
                part = self.ready(part)
            elif not self._direct(name, x):
                result, part = part, part.new_empty((*part.shape[:3], self._padded(x)), dtype=self.call.dtype)
                rounded.append((result, part))
            parts[name] = part
        for name, part in parts.items():
            # Native code counts batch rows and heads from the first of all, and goes to none but those of the part.
            start = heads.start if name in _OF_KEYS else of_queries.start
            row_step, head_step = part.stride()[:2]
            if name in _SUMS:
                head_step, row_step = part.shape[2] * part.shape[3], mask.h_kv * part.shape[2] * part.shape[3]
            else:
                setattr(here, f"{name}_step", _STRIDES(*part.stride()[:3]))
            before = rows.start * row_step + start * head_step
            setattr(here, name, part.data_ptr() - before * part.element_size())
        return _Part(here, parts, rounded)


@dataclass(frozen=True)
class _Part:
    """A call, what it points to, and results with what they are rounded from."""

    call: _Call
    parts: dict[str, Tensor]
    rounded: list[tuple[Tensor, Tensor]]

    def round(self) -> None:
        for result, wide in self.rounded:
            result.copy_(wide[..., : result.shape[-1]])


def _broadcast(x: Tensor, axes: int) -> ctypes.Array[ctypes.c_int64]:
    """Strides of the first axes, 0 where an axis of size 1 stands for all."""
    return (ctypes.c_int64 * axes)(*(0 if size == 1 else stride for size, stride in zip(x.shape[:axes], x.stride(), strict=False)))


def _operand(x: Tensor | None) -> _Operand:
    return _Operand() if x is None else _Operand(x.data_ptr(), _broadcast(x, 4))
