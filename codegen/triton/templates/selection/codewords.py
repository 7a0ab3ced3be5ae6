"""Product quantization inside kernels: the codeword nearest to a vector."""

import triton
import triton.language as tl


@triton.jit
def nearest_codeword(x, words, exists, PRECISION: tl.constexpr):
    """Index of the codeword nearest to each vector, the lower one where two are equally near: int32 [rows].

    x fp32 [rows, size]; words fp32 [codewords, size]; exists bool [codewords].
    """
    # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), so the nearest codeword has the greatest x.c - |c|^2 / 2: one product on matrix units.
    similarity = tl.dot(x, tl.trans(words), input_precision=PRECISION) - 0.5 * tl.sum(words * words, axis=1)[None, :]
    similarity = tl.where(exists[None, :], similarity, float("-inf"))
    return tl.argmax(similarity, axis=1, tie_break_left=True)
