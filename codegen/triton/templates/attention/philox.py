"""Dropout masks inside kernels, bit for bit those of `codegen/reference/random.py`."""

import triton
import triton.language as tl


@triton.jit
def philox_keep(seed_ptr, index, threshold):
    """Which elements survive: bool of the shape of `index` (int64, from 0 up).

    An element's fate is word index % 4 of Philox4x32-10 at counter index // 4; it stays if that word reaches
    `threshold` = round(p * 2**32), an int64, since p = 1 is past the last 32-bit word.
    """
    seed = tl.load(seed_ptr)
    counter = index >> 2
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low ^ low
    word_0, word_1, word_2, word_3 = tl.philox(seed, low, high, zero, zero)
    lane = index & 3
    word = tl.where(lane < 2, tl.where(lane == 0, word_0, word_1), tl.where(lane == 2, word_2, word_3))
    return word.to(tl.int64) >= threshold


@triton.jit
def philox_keep_runs(seed_ptr, start, threshold, LENGTH: tl.constexpr):
    """`philox_keep` of start[:, None] + arange(LENGTH): bool [rows, LENGTH]. Four times cheaper: neighbours share the words of a counter.

    `start` (int64 [rows]) and LENGTH are multiples of 4.
    """
    seed = tl.load(seed_ptr)
    counter = (start >> 2)[:, None] + tl.arange(0, LENGTH // 4)[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = low ^ low
    word_0, word_1, word_2, word_3 = tl.philox(seed, low, high, zero, zero)
    even = tl.interleave((word_0.to(tl.int64) >= threshold).to(tl.int8), (word_2.to(tl.int64) >= threshold).to(tl.int8))
    odd = tl.interleave((word_1.to(tl.int64) >= threshold).to(tl.int8), (word_3.to(tl.int64) >= threshold).to(tl.int8))
    return tl.interleave(even, odd) != 0
