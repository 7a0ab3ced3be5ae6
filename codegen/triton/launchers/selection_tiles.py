"""Tile sizes of the kernels that choose blocks. Facts that `choose` is given: WORDS, WIDTH and itemsize, as far as a kernel has them."""

from __future__ import annotations

import sympy

from sptc.codegen.triton.tuning.tiling import Table, Tiling

_ROWS, _COLUMNS, _WIDTH, _WORDS = sympy.symbols("ROWS COLUMNS WIDTH WORDS")
_WARPS, _STAGES, _WARP, _ITEM = sympy.symbols("num_warps num_stages warp_size itemsize")
_THREADS = _WARPS * _WARP
_FIXED = 40  # registers for addresses, masks and loop counters

ENCODE = Table(
    "encode_histogram",
    {"": (Tiling.of(4, 2, ROWS=128), Tiling.of(4, 2, ROWS=64), Tiling.of(8, 2, ROWS=256))},
    shared_memory=4 * (_ROWS + _WORDS) * _WIDTH + 4 * _ROWS * _WORDS,
    registers=_FIXED + (_ROWS * _WIDTH + 3 * _ROWS * _WORDS) / _THREADS,
)
STATISTICS = Table(
    "code_statistics",
    {"": (Tiling.of(4, 1, ROWS=64), Tiling.of(4, 1, ROWS=32))},
    shared_memory=4 * (_ROWS + _WORDS) * _WIDTH + 8 * _ROWS * _WORDS,
    registers=_FIXED + (_ROWS * _WIDTH + _WORDS * _WIDTH + 3 * _ROWS * _WORDS) / _THREADS,
)
VISIBLE = Table("visible_keys", {"": (Tiling.of(4, 1, KEYS=512),)}, sympy.Integer(0), sympy.Integer(_FIXED))
PAIRS = Table(
    "allowed_pairs",
    {"": (Tiling.of(4, 1, ROWS=64, COLUMNS=64), Tiling.of(4, 1, ROWS=32, COLUMNS=32))},
    shared_memory=4 * _ROWS * _COLUMNS / 4,
    registers=_FIXED + 3 * _ROWS * _COLUMNS / _THREADS,
)
MEANS = Table(
    "run_means",
    {"": (Tiling.of(4, 1, ROWS=64), Tiling.of(4, 1, ROWS=32))},
    shared_memory=4 * _ROWS * _WIDTH,
    registers=_FIXED + 2 * _ROWS * _WIDTH / _THREADS,
)
_HELD = _ITEM**2 / 2 * (_ROWS + _COLUMNS) * _WIDTH / (4 * _THREADS)  # registers of a product's operands: three products split fp32 in two
# There are few runs, so few rows: they have to keep a whole device busy.
LOGSUMEXP = Table(
    "pooled_logsumexp",
    {"": (Tiling.of(4, 2, ROWS=32, COLUMNS=64), Tiling.of(4, 2, ROWS=64, COLUMNS=64), Tiling.of(4, 1, ROWS=16, COLUMNS=32))},
    shared_memory=_ITEM * _WIDTH * (_ROWS + _STAGES * _COLUMNS),
    registers=_FIXED + 2 * _ROWS * _COLUMNS / _THREADS + _HELD,
)
SCORES = Table(
    "pooled_scores",
    {"": (Tiling.of(4, 2, ROWS=64, COLUMNS=64), Tiling.of(4, 2, ROWS=128, COLUMNS=64), Tiling.of(4, 1, ROWS=16, COLUMNS=32))},
    shared_memory=_ITEM * _WIDTH * (_STAGES * _ROWS + _COLUMNS) + 4 * _ROWS * _COLUMNS,
    registers=_FIXED + 3 * _ROWS * _COLUMNS / _THREADS + _HELD,
)
