"""Tiles of grouped products: which one a program computes, found on the device (only it knows how long the lists are), and their slices."""

import triton
import triton.language as tl


@triton.jit
def tile_position(program, row_tiles, COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a program. Those that run together cover GROUP row tiles by few columns: what they read stays in L2."""
    strip = GROUP * COLUMN_TILES
    first = (program // strip) * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    return first + (program % strip) % rows, (program % strip) // rows


@triton.jit
def list_segment(tile, offsets, capacity, BLOCKS: tl.constexpr, LANES: tl.constexpr, BLOCK_M: tl.constexpr):
    """(block, first entry, end of the block's entries) of row tile `tile`, where tiles hold up to BLOCK_M entries of one block.

    Entries from offsets[BLOCKS] to `capacity`, which belong to no list, count as block BLOCKS. Row tiles beyond the last one get a larger
    number. LANES is a power of two above BLOCKS.
    """
    lane = tl.arange(0, LANES)
    start = tl.load(offsets + lane, mask=lane <= BLOCKS, other=0)
    stop = tl.load(offsets + lane + 1, mask=lane < BLOCKS, other=0)
    stop = tl.where(lane == BLOCKS, capacity, stop)
    tiles = tl.where(lane <= BLOCKS, (stop - start + BLOCK_M - 1) // BLOCK_M, 0)
    ends = tl.cumsum(tiles, 0)
    done = ends <= tile
    block = tl.sum(done.to(tl.int32), 0)
    tile_in_block = tile - tl.max(tl.where(done, ends, 0), 0)
    first = tl.sum(tl.where(lane == block, start, 0), 0) + tile_in_block * BLOCK_M
    return block, first, tl.sum(tl.where(lane == block, stop, 0), 0)


@triton.jit
def halves(tile):
    """Left and right half of the columns of `tile`. An epilogue that goes by slices holds fewer values at a time, in fewer registers."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))
