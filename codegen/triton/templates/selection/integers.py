"""Integer arithmetic and reads of mask predicates: `//` and `%` round down, as in Python, where Triton's round towards zero."""

import triton
import triton.language as tl


@triton.jit
def floor_divide(x, y):
    quotient = x // y
    rest = x - quotient * y
    return tl.where((rest != 0) & ((rest < 0) != (y < 0)), quotient - 1, quotient)


@triton.jit
def floor_modulo(x, y):
    return x - floor_divide(x, y) * y


@triton.jit
def modulo_bounds(low, high, divisor):
    """The least and the greatest x % divisor of the x in [low, high], for divisor > 0; exact within one multiple."""
    same = floor_divide(low, divisor) == floor_divide(high, divisor)
    least = tl.where(same, floor_modulo(low, divisor), 0)
    return least, tl.where(same, floor_modulo(high, divisor), divisor - 1)


@triton.jit
def element(pointer, live):
    """What `pointer` points to where `live`, a bool tensor to which it broadcasts; bools as integers, integers as int64.

    A pointer that is the same along an axis is read once along it.
    """
    if pointer.type.is_block():
        if len(live.shape) == 2:
            if pointer.shape[0] < live.shape[0]:
                live = tl.max(live.to(tl.int32), axis=0, keep_dims=True) != 0
            if pointer.shape[1] < live.shape[1]:
                live = tl.max(live.to(tl.int32), axis=1, keep_dims=True) != 0
        value = tl.load(pointer, mask=live, other=0)
    else:
        value = tl.load(pointer)
    if value.dtype == tl.int1:
        value = value.to(tl.int32)
    elif tl.constexpr(value.dtype.is_int()):  # arithmetic with narrow ones must not wrap around
        value = value.to(tl.int64)
    return value
