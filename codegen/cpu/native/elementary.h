// Elementwise functions and "gradient times slope" of each, on vectors. ATen's values and slopes for finite arguments, to a few ulp.
//
// Names and arguments are those of the steps of codegen/expr.py. NaN stays NaN: a comparison decides only what it is sure of.
#pragma once

#include "product.h"

typedef decltype(Vector{} < Vector{}) Choice;

static inline Vector pick(Choice which, Vector a, Vector b) { return which ? a : b; }

template <class Function>
static inline Vector each(Function f, Vector x) {
    for (int i = 0; i < LANES; i++) x[i] = f(x[i]);
    return x;
}

static inline Vector absolute(Vector x) {
    const Vector y = x < REAL(0) ? -x : x;
    return y + REAL(0);  // -0 + 0 = 0
}

// One lane after the other: no activation that is common needs these to be fast.
static inline Vector sqrt(Vector x) { return each([](REAL a) { return std::sqrt(a); }, x); }
static inline Vector rsqrt(Vector x) { return REAL(1) / sqrt(x); }
static inline Vector power(Vector x, REAL exponent) { return each([=](REAL a) { return std::pow(a, exponent); }, x); }

#if REAL_IS_FLOAT
static inline Vector exp(Vector x) {  // `exponential` ends at e^88, before the largest number
    return exponential(x > 80.0f ? x - 40.0f : x) * (x > 80.0f ? spread(2.353852668e17f) : spread(1));
}

static inline Vector expm1(Vector x) {
    // By its series near 0, where the difference would cancel.
    const Vector high = 1 / 24.f + x * (1 / 120.f + x * (1 / 720.f + x * (1 / 5040.f)));
    const Vector series = x * (1.0f + x * (1 / 2.f + x * (1 / 6.f + x * high)));
    return pick(absolute(x) < REAL(0.4), series, exp(x) - 1.0f);
}

// log(1 + x) for x in [0, 1] = 2 artanh(x / (2 + x)), by its series.
static inline Vector log1p(Vector x) {
    const Vector s = x / (2.0f + x), t = s * s;
    const Vector high = 1 / 9.f + t * (1 / 11.f + t * (1 / 13.f + t * (1 / 15.f)));
    return 2.0f * s * (1.0f + t * (1 / 3.f + t * (1 / 5.f + t * (1 / 7.f + t * high))));
}

// erfc(z) / e^(-z^2) for z >= 0: a polynomial in t = 1 / (1 + 0.4 z), without a constant term, fitted on [0, 122]; relative error 1.3e-7.
static inline Vector scaled_erfc(Vector z) {
    const Vector t = 1.0f / (1.0f + 0.4f * z);
    constexpr REAL COEFFICIENTS[] = {-1.829454368e-01f, 1.691579375e-01f, -5.670487621e-03f, 1.414622781e-01f,
                                     1.685334985e-01f,  2.078439184e-01f, 2.256695208e-01f,  2.256758633e-01f};
    Vector p = spread(5.027303325e-02f);
    for (const REAL c : COEFFICIENTS) p = p * t + c;
    return p * t;
}

static inline Vector erf(Vector x) {
    const Vector z = absolute(x), s = x * x;
    const Vector near = x * (1.128379166f + s * (-3.761260917e-1f + s * (1.128283474e-1f + s * (-2.675794433e-2f + s * 4.719505354e-3f))));
    const Vector far = 1.0f - exponential(-s) * scaled_erfc(z);
    return pick(z < REAL(0.5), near, pick(x < REAL(0), -far, far));
}

// The share of a normal distribution below x, given e^(-x^2 / 2).
static inline Vector normal_share(Vector x, Vector density) {
    const Vector above = 0.5f * density * scaled_erfc(absolute(x) * 0.7071067811865476f);
    return pick(x < REAL(0), above, 1.0f - above);
}
#else
static inline Vector exp(Vector x) { return each([](REAL a) { return std::exp(a); }, x); }
static inline Vector expm1(Vector x) { return each([](REAL a) { return std::expm1(a); }, x); }
static inline Vector log1p(Vector x) { return each([](REAL a) { return std::log1p(a); }, x); }
static inline Vector erf(Vector x) { return each([](REAL a) { return std::erf(a); }, x); }
static inline Vector normal_share(Vector x, Vector) { return each([](REAL a) { return 0.5 * std::erfc(a * -0.7071067811865476); }, x); }
#endif

static inline Vector sigmoid(Vector x) { return REAL(1) / (REAL(1) + exp(-x)); }  // an infinite exponential gives the right 0
static inline Vector sigmoid_backward(Vector grad, Vector y) { return grad * (y * (REAL(1) - y)); }

static inline Vector tanh(Vector x) {
    const Vector below = expm1(REAL(-2) * absolute(x));  // in (-1, 0]
    const Vector y = below / (REAL(2) + below);
    return pick(x < REAL(0), y, -y);
}
static inline Vector tanh_backward(Vector grad, Vector y) { return grad * (REAL(1) - y * y); }

static inline Vector relu(Vector x) { return pick(x < REAL(0), Vector{}, x); }
static inline Vector relu_backward(Vector grad, Vector x) { return pick(x <= REAL(0), Vector{}, grad); }

static inline Vector gelu(Vector x) { return x * normal_share(x, exponential(REAL(-0.5) * x * x)); }
static inline Vector gelu_backward(Vector grad, Vector x) {
    const Vector density = exponential(REAL(-0.5) * x * x);
    return grad * (normal_share(x, density) + x * (REAL(0.3989422804014327) * density));
}

// (1 + tanh(z)) / 2 = sigmoid(2 z), which does not cancel for negative z.
static inline Vector gelu_tanh(Vector x) { return x * sigmoid(REAL(1.5957691216057308) * (x + REAL(0.044715) * x * x * x)); }
static inline Vector gelu_tanh_backward(Vector grad, Vector x) {
    const Vector share = sigmoid(REAL(1.5957691216057308) * (x + REAL(0.044715) * x * x * x));
    const Vector inner = REAL(1.5957691216057308) * (REAL(1) + REAL(0.134145) * x * x);
    return grad * (share + x * (share * (REAL(1) - share)) * inner);
}

static inline Vector silu(Vector x) { return x * sigmoid(x); }
static inline Vector silu_backward(Vector grad, Vector x) {
    const Vector share = sigmoid(x);
    return grad * (share * (REAL(1) + x * (REAL(1) - share)));
}

// tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2) with e = exp(x); 1 from x = 20 on.
static inline Vector tanh_softplus(Vector x) {
    const Vector e = exp(pick(x > REAL(20), spread(20), x)), n = e * (e + REAL(2));
    return n / (n + REAL(2));
}
static inline Vector mish(Vector x) { return x * tanh_softplus(x); }
static inline Vector mish_backward(Vector grad, Vector x) {
    const Vector share = tanh_softplus(x);
    return grad * (share + x * sigmoid(x) * (REAL(1) - share * share));
}

static inline Vector softplus(Vector x, REAL beta, REAL threshold) {
    const Vector z = x * beta, positive = pick(z < REAL(0), Vector{}, z);
    return pick(z > threshold, x, (positive + log1p(exponential(-absolute(z)))) / beta);
}
static inline Vector softplus_backward(Vector grad, Vector x, REAL beta, REAL threshold) {
    const Vector z = x * beta;
    return pick(z > threshold, grad, grad * sigmoid(z));
}

static inline Vector elu(Vector x, REAL alpha, REAL scale, REAL input_scale) {
    return pick(x > REAL(0), scale * x, scale * alpha * expm1(x * input_scale));
}
static inline Vector elu_backward(Vector grad, Vector x, REAL alpha, REAL scale, REAL input_scale) {
    return pick(x > REAL(0), grad * scale, grad * (scale * alpha * input_scale) * exp(x * input_scale));
}

static inline Vector leaky_relu(Vector x, REAL slope) { return pick(x > REAL(0), x, x * slope); }
static inline Vector leaky_relu_backward(Vector grad, Vector x, REAL slope) { return pick(x > REAL(0), grad, grad * slope); }

static inline Vector clamp_min(Vector x, REAL low) { return pick(x < low, spread(low), x); }
static inline Vector clamp_min_backward(Vector grad, Vector x, REAL low) { return pick(x >= low, grad, Vector{}); }
static inline Vector clamp_max(Vector x, REAL high) { return pick(x > high, spread(high), x); }
static inline Vector clamp_max_backward(Vector grad, Vector x, REAL high) { return pick(x <= high, grad, Vector{}); }
static inline Vector clamp(Vector x, REAL low, REAL high) { return clamp_max(clamp_min(x, low), high); }
static inline Vector clamp_backward(Vector grad, Vector x, REAL low, REAL high) {
    return pick(x >= low, pick(x <= high, grad, Vector{}), Vector{});
}

static inline Vector hardtanh(Vector x, REAL low, REAL high) { return clamp(x, low, high); }
static inline Vector hardtanh_backward(Vector grad, Vector x, REAL low, REAL high) {
    return pick(x <= low, Vector{}, pick(x >= high, Vector{}, grad));
}
static inline Vector hardsigmoid(Vector x) { return clamp(x + REAL(3), 0, 6) / REAL(6); }
static inline Vector hardsigmoid_backward(Vector grad, Vector x) {
    return pick(x > REAL(-3), pick(x < REAL(3), grad / REAL(6), Vector{}), Vector{});
}
static inline Vector hardswish(Vector x) { return x * hardsigmoid(x); }
static inline Vector hardswish_backward(Vector grad, Vector x) {
    return pick(x <= REAL(-3), Vector{}, pick(x < REAL(3), grad * (x / REAL(3) + REAL(0.5)), grad));
}

static inline Vector absolute_backward(Vector grad, Vector x) {
    return pick(x < REAL(0), -grad, pick(x > REAL(0), grad, REAL(0) * grad));
}

static inline Vector maximum(Vector x, Vector y) { return pick(x >= y, x, pick(x == x, y, x)); }
static inline Vector maximum_backward(Vector grad, Vector x, Vector y) {
    return pick(x < y, Vector{}, pick(x == y, REAL(0.5) * grad, grad));
}
