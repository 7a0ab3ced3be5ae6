"""Functions of scores that Triton has not, as a soft cap is made of."""

import triton
import triton.language as tl


@triton.jit
def hyperbolic_tangent(x):
    """tanh(x): 1 - 2 / (e^2x + 1) loses all digits near 0, where a polynomial takes its place (Cephes, tanhf)."""
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(size + size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def logistic(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + tl.exp(-x))
