"""Tile sizes of the attention kernels.

Facts that `choose` is given: `head_dim` and `value_dim` (padded to powers of two), `itemsize` of the operands, `rows` of a tile and
`key_block`. A tile larger than there are rows or keys for is cut down by the launcher.
"""

from __future__ import annotations

from sympy import Max, symbols

from sptc.codegen.tiling import Table, Tiling

_M, _N, _WARPS, _STAGES, _WARP_SIZE = symbols("BLOCK_M BLOCK_N num_warps num_stages warp_size")
_D, _V, _ITEMSIZE = symbols("head_dim value_dim itemsize")
_THREADS = _WARPS * _WARP_SIZE
_FIXED = 48  # registers for addresses, masks and loop counters

FORWARD = Table(
    "attention_forward",
    {
        "": (
            Tiling.of(8, 3, BLOCK_M=128, BLOCK_N=64),
            Tiling.of(8, 2, BLOCK_M=128, BLOCK_N=64),
            Tiling.of(4, 2, BLOCK_M=64, BLOCK_N=64),
            Tiling.of(4, 2, BLOCK_M=64, BLOCK_N=32),
            Tiling.of(4, 1, BLOCK_M=32, BLOCK_N=32),
            Tiling.of(4, 1, BLOCK_M=16, BLOCK_N=16),
        )
    },
    shared_memory=_ITEMSIZE * (_M * _D + Max(1, _STAGES - 1) * _N * (_D + _V)),
    registers=_FIXED + _M * (_V + 2 * _N) / _THREADS,
)
BACKWARD_Q = Table(
    "attention_backward_q",
    {
        "": (
            Tiling.of(8, 3, BLOCK_M=128, BLOCK_N=64),
            Tiling.of(8, 2, BLOCK_M=128, BLOCK_N=64),
            Tiling.of(4, 2, BLOCK_M=64, BLOCK_N=64),
            Tiling.of(4, 2, BLOCK_M=64, BLOCK_N=32),
            Tiling.of(4, 1, BLOCK_M=32, BLOCK_N=32),
            Tiling.of(4, 1, BLOCK_M=16, BLOCK_N=16),
        )
    },
    shared_memory=_ITEMSIZE * (_M * (_D + _V) + Max(1, _STAGES - 1) * _N * (_D + _V)),
    registers=_FIXED + _M * (_D + 3 * _N) / _THREADS,
)
BACKWARD_KV = Table(
    "attention_backward_kv",
    {
        "": (
            Tiling.of(8, 2, BLOCK_M=64, BLOCK_N=64),
            Tiling.of(4, 2, BLOCK_M=64, BLOCK_N=64),
            Tiling.of(4, 2, BLOCK_M=32, BLOCK_N=64),
            Tiling.of(4, 2, BLOCK_M=32, BLOCK_N=32),
            Tiling.of(4, 1, BLOCK_M=16, BLOCK_N=16),
        )
    },
    shared_memory=_ITEMSIZE * (_N * (_D + _V) + Max(1, _STAGES - 1) * _M * (_D + _V)),
    registers=_FIXED + (_N * (_D + _V) + 3 * _M * _N) / _THREADS,
)
