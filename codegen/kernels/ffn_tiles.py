"""Tile sizes of the routed FFN's kernels. `width` is a block's hidden units, `depth` what is summed over, `columns` what is computed.

Matrix units want 128 x 128 tiles or more; two up projections share a tile of x and so need half the columns for the same registers. The
estimates of registers leave room for addresses and for the epilogue; kernels compiled ahead of time show where they are too low.
"""

from __future__ import annotations

import sympy

from sptc.codegen.tiling import Table, Tiling

_M, _N, _K, _WARPS, _STAGES, _LANES = sympy.symbols("BLOCK_M BLOCK_N BLOCK_K num_warps num_stages warp_size")
_SLICES, _UPS, _DROPS, _ITEM = sympy.symbols("SLICES ups dropouts itemsize")
_THREADS = _WARPS * _LANES
_SUMS = _M * _N * _ITEM / (2 * _THREADS)  # fp32 operands need no more room for sums, but for what they are made of
_CROWD = sympy.Max(1, _THREADS / 256)  # from 256 threads on, more of them share the same registers
_Row = tuple[int, int, int, int, int]  # BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages


def _tiles(*rows: _Row, **more: int) -> tuple[Tiling, ...]:
    return tuple(Tiling.of(warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=8, **more) for m, n, k, warps, stages in rows)


_HOPPER: tuple[_Row, ...] = (
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 64, 64, 4, 4), (128, 64, 64, 8, 3),
    (64, 64, 32, 4, 3), (64, 32, 32, 4, 2),
)  # fmt: skip
_ROWS: dict[str, tuple[_Row, ...]] = {
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "gfx942": (
        (256, 128, 32, 8, 2),
        (128, 128, 64, 8, 2),
        (128, 128, 32, 8, 2),
        (128, 64, 32, 4, 2),
        (64, 64, 32, 4, 2),
        (64, 32, 32, 4, 2),
    ),
    "": ((128, 256, 32, 8, 3), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 64, 32, 4, 3), (64, 64, 32, 4, 2), (64, 32, 32, 4, 2)),
}


def _sliced(rows: dict[str, tuple[_Row, ...]]) -> dict[str, tuple[Tiling, ...]]:
    return {
        name: tuple(tile for row in of_target for part in (64, 32, 16) for tile in _tiles(row, SLICES=max(1, row[1] // part)))
        for name, of_target in rows.items()
    }


# Before Hopper operands of a product pass through registers too: two up projections of 128 columns each do not fit.
_NARROW: tuple[_Row, ...] = ((128, 256, 32, 8, 3), (128, 64, 64, 8, 3), (128, 64, 32, 8, 4), (64, 64, 32, 4, 2), (64, 32, 32, 4, 2))
_PLAIN = {name: _tiles(*rows) for name, rows in _ROWS.items()}

UP = Table(
    "ffn_up",
    _sliced({**_ROWS, "": _NARROW}),
    shared_memory=_STAGES * (_M + _UPS * _N) * _K * _ITEM,
    registers=_CROWD * (_UPS * _SUMS * (1 + (1 + _DROPS) / _SLICES) + 64),
)
GRAD_HIDDEN = Table(
    "ffn_grad_hidden",
    _sliced(_ROWS),
    shared_memory=_STAGES * (_M + _N) * _K * _ITEM,
    registers=_CROWD * (_SUMS * (1 + _UPS * (1 + _DROPS) / _SLICES) + 112),
)
PRODUCT = Table(
    "grouped_product",
    _PLAIN,
    shared_memory=_STAGES * (_M + _N) * _K * _ITEM,
    registers=_CROWD * (_SUMS + 64),
)
# Rows wait for their tokens, which are loaded too: a buffer for each two stages.
OUTER = Table(
    "grouped_outer",
    {name: _tiles(*((m, n, k, warps, 2 * stages - 1) for m, n, k, warps, stages in rows)) for name, rows in _ROWS.items()},
    shared_memory=(_STAGES + 1) / 2 * (_M + _N) * _K * _ITEM,
    registers=PRODUCT.registers,
)
_T, _C = sympy.symbols("BLOCK_T BLOCK_C")
SUM = Table(
    "gather_sum",
    {"": tuple(Tiling.of(4, 1, BLOCK_T=t, BLOCK_C=c) for t, c in ((4, 512), (8, 256), (4, 256), (16, 128)))},
    shared_memory=sympy.Integer(0),
    registers=2 * _T * _C / _THREADS + 32,
)
