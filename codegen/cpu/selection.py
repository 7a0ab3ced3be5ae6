"""Selection of key blocks on a CPU: `sptc::select_blocks`, computed by native/selection.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from sptc.codegen.cpu.compiler import REAL, native
from sptc.codegen.cpu.mask import CpuMask
from sptc.codegen.cpu.parallel import share, worker_count
from sptc.codegen.reference.block_lists import block_count, list_width, query_run, statistics_stride

_STRIDES = ctypes.c_int64 * 3


class _Call(ctypes.Structure):
    """`Call` of native/selection.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k")),
        *((name, _STRIDES) for name in ("q_step", "k_step")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "n", "m", "d", "query_block", "key_block", "run")),
        *((name, ctypes.c_int64) for name in ("tiles", "blocks", "width")),
        ("scale", ctypes.c_double),
        ("own", ctypes.c_int64),
        *(
            (name, kind)
            for part in ("visible", "allowed")
            for name, kind in ((part, ctypes.c_void_p), (f"{part}_steps", ctypes.c_int64 * 2))
        ),
        ("words", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("subspaces", "codewords", "q_stride", "k_stride")),
        *((name, ctypes.c_void_p) for name in ("sums", "counts", "ids", "lengths")),
    ]


def select_blocks(
    q: Tensor, k: Tensor, codebooks: Tensor | None, mask: CpuMask, selector: str, density: float, scale: float, own: bool, statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `docs/design/operators.md`. Scores are computed in fp32."""
    (b, h_kv, m, d), n = k.shape, q.shape[2]
    tiles, blocks = int(block_count(n, mask.query_block)), int(block_count(m, mask.key_block))
    width = int(list_width(n, m, density, mask.query_block, mask.key_block, own))
    stored = torch.bfloat16 if q.dtype == k.dtype == torch.bfloat16 else torch.float32
    q, k = _ready(q, stored), _ready(k, stored)
    visible, allowed = mask.visible_keys(), mask.allowed_pairs()
    visible = None if visible is None else visible.contiguous()
    allowed = allowed.expand(*allowed.shape[:2], tiles, blocks).contiguous()
    words = None if selector == "pooled" or codebooks is None else codebooks.float().contiguous()
    ids = torch.empty((b, h_kv, tiles, width), dtype=torch.int32)
    counts = torch.empty((b, h_kv, tiles), dtype=torch.int32)
    code_sums, code_counts = torch.empty(0), torch.empty(0)
    if statistics and words is not None:
        code_sums, code_counts = torch.zeros(words.shape), torch.zeros(words.shape[:3])
    call = _Call(
        q=q.data_ptr(), k=k.data_ptr(), q_step=_STRIDES(*q.stride()[:3]), k_step=_STRIDES(*k.stride()[:3]), batch=b, heads=q.shape[1],
        key_heads=h_kv, n=n, m=m, d=d, query_block=mask.query_block, key_block=mask.key_block,
        run=query_run(mask.query_block), tiles=tiles, blocks=blocks, width=width,
        scale=scale, own=own and mask.query_block > 1, allowed=allowed.data_ptr(), allowed_steps=_steps(allowed),
        ids=ids.data_ptr(), lengths=counts.data_ptr(),
    )  # fmt: skip
    if visible is not None:
        call.visible, call.visible_steps = visible.data_ptr(), _steps(visible)
    if words is not None:
        call.words, call.subspaces, call.codewords = words.data_ptr(), words.shape[1], words.shape[2]
        call.q_stride, call.k_stride = statistics_stride(b, n), statistics_stride(b, m)
    if code_sums.numel():
        call.sums, call.counts = code_sums.data_ptr(), code_counts.data_ptr()
    library, pairs = native("selection", **REAL[q.dtype]), b * h_kv
    step = max(1, b) if statistics else max(1, pairs // (4 * worker_count()))  # statistics of a head add up in one order

    def work(starts: Iterator[int]) -> None:
        for start in starts:
            library.select_blocks(ctypes.byref(call), ctypes.c_int64(start), ctypes.c_int64(min(start + step, pairs)))

    share(range(0, pairs, step), work)
    return ids, counts, code_sums, code_counts


def _ready(x: Tensor, stored: torch.dtype) -> Tensor:
    x = x.to(stored)
    return x if x.stride(-1) == 1 else x.contiguous()


def _steps(x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Strides of batch rows and heads, 0 where one stands for all."""
    return (ctypes.c_int64 * 2)(*(0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride(), strict=False)))
