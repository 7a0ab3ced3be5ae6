// Rows of the hidden units of an FFN through its activation and back: codegen/cpu/activation.py writes the activation below this.
// MOST is the most up projections that there may be.
//
// Every row is read once: the activation, its gradients, the router's scale and that scale's gradient come out of one pass.
#pragma once

#include "elementary.h"

// Every field has 8 bytes, in the order of `_Call` in activation.py. All rows have adjacent elements.
struct Call {
    i64 rows, width;
    const REAL* u[MOST];
    i64 u_row;
    const REAL* scale;  // [rows], or null: 1
    REAL* value;        // [rows, width] or, backward, null
    const REAL* grad;   // [rows, width]: of scale * activation
    REAL* grad_u[MOST];  // [rows, width]; one of them may be `grad`
    REAL* grad_scale;    // [rows] or null
};

// Some adjacent elements as a vector; what stands past the last one is dropped.
static inline Vector load_some(const REAL* p, i64 count) {
    REAL edge[LANES];
    for (int i = 0; i < LANES; i++) edge[i] = i < count ? p[i] : REAL(1);
    return load(edge);
}

static inline void store_some(REAL* p, i64 count, Vector x) {
    REAL edge[LANES];
    store(edge, x);
    memcpy(p, edge, count * sizeof(REAL));
}

// act(u, value) sets value from u[0], u[1], ...
template <int UPS, class Activation>
static void forward_rows(const Call& c, Activation act) {
    for (i64 i = 0; i < c.rows; i++) {
        const REAL scale = c.scale ? c.scale[i] : 1;
        REAL* value = c.value + i * c.width;
        const i64 from = i * c.u_row;
        const auto some = [&](i64 j, auto read, auto write) {
            Vector u[UPS], a;
            for (int k = 0; k < UPS; k++) u[k] = read(c.u[k] + from + j);
            act(u, a);
            write(value + j, a * scale);
        };
        i64 j = 0;
        for (; j + LANES <= c.width; j += LANES) some(j, load, store);
        const i64 left = c.width - j;
        if (left)
            some(j, [=](const REAL* p) { return load_some(p, left); }, [=](REAL* p, Vector x) { store_some(p, left, x); });
    }
}

// act(grad, u, value, grads) sets value from u, and the gradient in each u from grad, the gradient in value.
template <int UPS, class Activation>
static void backward_rows(const Call& c, Activation act) {
    for (i64 i = 0; i < c.rows; i++) {
        const REAL scale = c.scale ? c.scale[i] : 1;
        const i64 from = i * c.u_row, at = i * c.width;
        Vector sum{};
        const auto some = [&](i64 j, auto read, auto write, i64 count) {
            Vector u[UPS], a, grads[UPS];
            for (int k = 0; k < UPS; k++) u[k] = read(c.u[k] + from + j);
            const Vector grad = read(c.grad + at + j);
            act(grad * scale, u, a, grads);
            if (c.value) write(c.value + at + j, a);
            Vector product = grad * a;
            for (i64 l = count; l < LANES; l++) product[l] = 0;
            sum += product;
            for (int k = 0; k < UPS; k++) write(c.grad_u[k] + at + j, grads[k]);
        };
        i64 j = 0;
        for (; j + LANES <= c.width; j += LANES) some(j, load, store, LANES);
        const i64 left = c.width - j;
        if (left)
            some(j, [=](const REAL* p) { return load_some(p, left); }, [=](REAL* p, Vector x) { store_some(p, left, x); }, left);
        if (c.grad_scale) {
            REAL total = 0;
            for (int l = 0; l < LANES; l++) total += sum[l];
            c.grad_scale[i] = total;
        }
    }
}
