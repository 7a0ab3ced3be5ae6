"""Elementwise functions and "gradient times slope" of each, in fp32, that overflow nowhere and have ATen's values and slopes.

Names and arguments are those of the steps of `codegen/expr.py`. NaN stays NaN, as in ATen: a comparison decides only what it is sure of.
"""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def erf(x):
    return tl.erf(x)


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


@triton.jit
def expm1(x):
    """exp(x) - 1, by its series near 0, where the difference would cancel."""
    series = x * (1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))))
    return tl.where(tl.abs(x) < 0.4, series, tl.exp(x) - 1.0)


@triton.jit
def sigmoid(x):
    # An infinite exponential gives the right 0.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def sigmoid_backward(grad, y):
    return grad * (y * (1.0 - y))


@triton.jit
def tanh(x):
    below = expm1(-2.0 * tl.abs(x))  # in (-1, 0]
    y = below / (2.0 + below)
    return tl.where(x < 0.0, y, -y)


@triton.jit
def tanh_backward(grad, y):
    return grad * (1.0 - y * y)


@triton.jit
def relu(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def relu_backward(grad, x):
    return tl.where(x <= 0.0, 0.0, grad)


@triton.jit
def gelu(x):
    return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_backward(grad, x):
    share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return grad * (share + x * density)


@triton.jit
def gelu_tanh(x):
    # (1 + tanh(z)) / 2 = sigmoid(2 z), which does not cancel for negative z.
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu_tanh_backward(grad, x):
    share = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return grad * (share + x * (share * (1.0 - share)) * inner)


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def silu_backward(grad, x):
    share = sigmoid(x)
    return grad * (share * (1.0 + x * (1.0 - share)))


@triton.jit
def tanh_softplus(x):
    """tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2) with e = exp(x); 1 from x = 20 on."""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    n = e * (e + 2.0)
    return n / (n + 2.0)


@triton.jit
def mish(x):
    return x * tanh_softplus(x)


@triton.jit
def mish_backward(grad, x):
    share = tanh_softplus(x)
    return grad * (share + x * sigmoid(x) * (1.0 - share * share))


@triton.jit
def softplus(x, beta, threshold):
    z = x * beta
    e = tl.exp(-tl.abs(z))
    # log(1 + e) = 2 artanh(e / (2 + e)), by its series: no cancellation for small e.
    s = e / (2.0 + e)
    t = s * s
    log1p = 2.0 * s * (1.0 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15))))))))
    return tl.where(z > threshold, x, (tl.where(z < 0.0, 0.0, z) + log1p) / beta)


@triton.jit
def softplus_backward(grad, x, beta, threshold):
    z = x * beta
    return tl.where(z > threshold, grad, grad * sigmoid(z))


@triton.jit
def elu(x, alpha, scale, input_scale):
    return tl.where(x > 0.0, scale * x, scale * alpha * expm1(x * input_scale))


@triton.jit
def elu_backward(grad, x, alpha, scale, input_scale):
    return tl.where(x > 0.0, grad * scale, grad * (scale * alpha * input_scale) * tl.exp(x * input_scale))


@triton.jit
def leaky_relu(x, negative_slope):
    return tl.where(x > 0.0, x, x * negative_slope)


@triton.jit
def leaky_relu_backward(grad, x, negative_slope):
    return tl.where(x > 0.0, grad, grad * negative_slope)


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def clamp_backward(grad, x, low, high):
    return tl.where((x >= low) & (x <= high), grad, 0.0)


@triton.jit
def clamp_min(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def clamp_min_backward(grad, x, low):
    return tl.where(x >= low, grad, 0.0)


@triton.jit
def clamp_max(x, high):
    return tl.where(x > high, high, x)


@triton.jit
def clamp_max_backward(grad, x, high):
    return tl.where(x <= high, grad, 0.0)


@triton.jit
def hardtanh(x, low, high):
    return clamp(x, low, high)


@triton.jit
def hardtanh_backward(grad, x, low, high):
    return tl.where((x <= low) | (x >= high), 0.0, grad)


@triton.jit
def hardsigmoid(x):
    return clamp(x + 3.0, 0.0, 6.0) * (1 / 6)


@triton.jit
def hardsigmoid_backward(grad, x):
    return tl.where((x > -3.0) & (x < 3.0), grad * (1 / 6), 0.0)


@triton.jit
def hardswish(x):
    return x * hardsigmoid(x)


@triton.jit
def hardswish_backward(grad, x):
    return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, grad * (x * (1 / 3) + 0.5), grad))


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def absolute_backward(grad, x):
    return tl.where(x < 0.0, -grad, tl.where(x > 0.0, grad, 0.0 * grad))


@triton.jit
def maximum(x, y):
    return tl.where((x >= y) | (x != x), x, y)


@triton.jit
def maximum_backward(grad, x, y):
    return tl.where(x < y, 0.0, tl.where(x == y, 0.5 * grad, grad))


@triton.jit
def power(x, exponent):
    """x ** exponent for x >= 0, and NaN below: multiples of 1/2 are written as products and roots instead."""
    return tl.exp(exponent * tl.log(x))
