"""The sum over a token's list entries: no two programs write to one row, so there are no atomics and the bits are the same every time."""

import triton
import triton.language as tl


@triton.jit
def gather_sum(
    partial,  # [capacity, COLUMNS]
    counts,  # int32 [N]
    entries,  # int32 [N, BLOCKS], the first counts[t] of a row count, in any order
    out,  # [N, COLUMNS]
    rows,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_T tokens x BLOCK_C columns; entries ascend, and with them blocks. Zeros for a token in no list."""
    NONE: tl.constexpr = 0x7FFFFFFF
    column_tiles = tl.cdiv(COLUMNS, BLOCK_C)
    token = (tl.program_id(0) // column_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) % column_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_rows = token < rows
    in_columns = column < COLUMNS
    count = tl.load(counts + token, mask=in_rows, other=0)
    lane = tl.arange(0, LANES)
    left = tl.load(
        entries + token.to(tl.int64)[:, None] * BLOCKS + lane[None, :],
        mask=(lane[None, :] < tl.minimum(count, BLOCKS)[:, None]),
        other=NONE,
    )
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for _ in range(0, tl.minimum(tl.max(count, 0), BLOCKS)):
        entry = tl.min(left, 1)
        left = tl.where(left == entry[:, None], NONE, left)
        total += tl.load(
            partial + entry.to(tl.int64)[:, None] * COLUMNS + column[None, :],
            mask=(entry != NONE)[:, None] & in_columns[None, :],
            other=0.0,
        ).to(tl.float32)
    place = token.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])
