"""Tile sizes of the attention kernels.

Facts that `choose` is given: `head_dim` and `value_dim` (padded to powers of two), `itemsize` of the operands, `rows` of a tile,
`key_block`, `dropout` and `transform` (0 or 1), and `through_registers`: 1 where matrix units read both operands from registers, 0 where
they read shared memory. A tile larger than there are rows or keys for is cut down by the launcher.

The expressions were fitted to what compiling for sm_80, sm_90, sm_100 and gfx942 reports in bf16, with a causal mask.
"""

from __future__ import annotations

from sympy import Max, floor, symbols

from sptc.codegen.triton.tuning.tiling import Table, Tiling

_M, _N, _WARPS, _STAGES, _WARP_SIZE = symbols("BLOCK_M BLOCK_N num_warps num_stages warp_size")
_D, _V, _ITEMSIZE, _DROPOUT, _TRANSFORM, _THROUGH = symbols("head_dim value_dim itemsize dropout transform through_registers")
_THREADS = _WARPS * _WARP_SIZE
_AMD = (_WARP_SIZE - 32) / 32  # 1 or 0. There what a program keeps, and one buffer of what it streams, stay in registers.
# A block's number must arrive before its keys can be asked for: a buffer for each second stage.
_BUFFERS = Max(1, floor(_STAGES / 2) + 1 - _AMD)
# From 512 threads on, programs have fewer registers for each thread than a thread can name. AMD's compiler takes more of them.
_SHARE = Max(1, _THREADS / 256) * (1 + 0.6 * _AMD)
_WIDTH = _ITEMSIZE / 2  # registers of two elements


def _candidates(*rows: tuple[int, int, int, int]) -> tuple[Tiling, ...]:
    """From (warps, stages, BLOCK_M, BLOCK_N) of each."""
    return tuple(Tiling.of(warps, stages, BLOCK_M=m, BLOCK_N=n) for warps, stages, m, n in rows)


# fmt: off
FORWARD = Table(
    "attention_forward",
    {
        "gfx942": _candidates(
            (8, 2, 128, 64), (4, 1, 128, 64), (4, 2, 64, 64), (4, 1, 64, 64),
            (4, 1, 64, 32), (4, 1, 32, 32), (4, 1, 16, 16),
        ),
        "": _candidates(
            (8, 3, 128, 64), (8, 5, 128, 64), (4, 3, 128, 64), (4, 3, 64, 64),
            (8, 2, 64, 64), (8, 2, 64, 32), (4, 1, 32, 32), (4, 1, 16, 16),
        ),
    },
    shared_memory=_ITEMSIZE * ((1 - _AMD) * _M * _D + _BUFFERS * _N * (_D + _V) + _AMD * _M * _N),
    registers=_SHARE
    * (40 + (_M * (_V + (2 + 2 * _DROPOUT + _AMD * _TRANSFORM) * _N + _THROUGH * _WIDTH * _D) + 0.3 * _N * (_D + _V)) / _THREADS),
)
BACKWARD_Q = Table(
    "attention_backward_q",
    {
        # Two stages of 64 x 64 spill for heads of 128 with padding.
        "gfx942": _candidates((4, 2, 64, 32), (4, 1, 64, 64), (4, 1, 64, 32), (4, 1, 32, 32), (4, 1, 16, 16)),
        "": _candidates((8, 3, 128, 64), (8, 3, 128, 32), (4, 3, 64, 64), (8, 2, 64, 64), (8, 2, 64, 32), (4, 1, 32, 32), (4, 1, 16, 16)),
    },
    shared_memory=_ITEMSIZE * (((1 - _AMD) * _M + _BUFFERS * _N) * (_D + _V) + _AMD * _M * _N),
    registers=_SHARE
    * (50 + (_M * (_D + (2.5 + 2 * _DROPOUT) * _N) + 0.3 * _N * (_D + _V) + _THROUGH * _WIDTH * _M * (_D + _V) / 2) / _THREADS),
)
BACKWARD_KV = Table(
    "attention_backward_kv",
    {
        "gfx942": _candidates((4, 2, 32, 64), (4, 1, 64, 64), (4, 1, 32, 64), (4, 1, 32, 32), (4, 1, 16, 16)),
        "sm_80": _candidates((4, 2, 32, 64), (8, 2, 64, 64), (8, 3, 32, 64), (8, 2, 32, 32), (4, 1, 16, 32), (4, 1, 16, 16)),
        # Three stages of 32 x 64: with two, Triton 3.6's ptxas 12.9 makes room for three programs and spills for it; 13.1 does not.
        "sm_100": _candidates(
            (8, 3, 64, 128), (8, 3, 64, 64), (4, 3, 64, 64), (4, 3, 32, 64),
            (8, 3, 32, 64), (8, 2, 32, 32), (4, 1, 16, 16),
        ),
        "": _candidates((8, 3, 64, 128), (8, 3, 64, 64), (4, 3, 64, 64), (4, 3, 32, 64), (8, 2, 32, 64), (8, 2, 32, 32), (4, 1, 16, 16)),
    },
    shared_memory=_ITEMSIZE * (((1 - _AMD) * _N + _BUFFERS * _M) * (_D + _V) + _M * _N),
    registers=_SHARE
    * (90 + (_N * (_D + _V) + (2.5 + 4.5 * _DROPOUT) * _M * _N + 0.3 * _M * (_D + _V) + _THROUGH * _WIDTH * _N * (_D + _V) / 2) / _THREADS),
)
# fmt: on
