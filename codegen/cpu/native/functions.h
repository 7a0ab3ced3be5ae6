// Functions of vectors of scores, as a soft cap is made of.
#pragma once

#include "product.h"

// 1 - 2 / (e^2x + 1) loses all digits near 0, where a polynomial takes its place (Cephes, tanhf).
static inline Vector hyperbolic_tangent(Vector x) {
#if REAL_IS_FLOAT
    const Vector size = x < 0 ? -x : x, square = x * x;
    Vector p = spread(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Vector far = 1 - 2 / (exponential(size + size) + 1);
    return size < 0.625f ? p * square * x + x : x < 0 ? -far : far;
#else
    Vector y;
    for (int i = 0; i < LANES; i++) y[i] = std::tanh(x[i]);
    return y;
#endif
}

static inline Vector logistic(Vector x) { return 1 / (1 + exponential(-x)); }

static inline Vector error_function(Vector x) {
    Vector y;
    for (int i = 0; i < LANES; i++) y[i] = std::erf(x[i]);
    return y;
}
