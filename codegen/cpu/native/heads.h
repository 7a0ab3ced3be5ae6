// Tensors [b, h, rows, size] of any strides, as attention and selection read and write them, of numbers as models store them.
#pragma once

#include "product.h"

#include <algorithm>
#include <type_traits>
#include <vector>

constexpr i64 CHUNK = 64;  // queries at a time: their scores stay in the cache

struct Strides {
    i64 b, h, row;  // of elements; within a row they are adjacent
};

template <typename T>
static T* at(T* x, const Strides& s, i64 b, i64 h, i64 row) {
    return x + b * s.b + h * s.h + row * s.row;
}

static REAL* take(std::vector<REAL>& x, i64 size) {
    if ((i64)x.size() < size) x.resize(size);
    return x.data();
}

#if STORED_IS_BF16
typedef uint16_t Stored;  // the upper half of a float
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

static inline Vector wide(const Stored* p) {
    const Halves x = *(const LooseHalves*)p;
    return (Vector)(__builtin_convertvector(x, Words) << 16);
}

// To the nearest, of two equally near ones the even.
static inline void narrow(Stored* p, Vector x) {
    const Words bits = (Words)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *(LooseHalves*)p = __builtin_convertvector((x == x) ? rounded : Words{} + 0x7fc0, Halves);
}
#else
typedef REAL Stored;

static inline Vector wide(const Stored* p) { return load(p); }
static inline void narrow(Stored* p, Vector x) { store(p, x); }
#endif

// Whether rows of so many numbers can be read and written where they lie.
static inline bool direct(i64 size) { return std::is_same<Stored, REAL>::value && size % LANES == 0; }

struct Rows {
    const REAL* first;
    i64 step;
};

// Rows as REAL, zeros behind each up to whole vectors: where they lie, or copies in `to`.
static Rows widened(const Stored* x, i64 step, i64 rows, i64 size, std::vector<REAL>& to) {
    if (direct(size)) return {(const REAL*)x, step};
    const i64 padded = up_to(size, LANES), whole = size / LANES * LANES;
    REAL* row = take(to, rows * padded);
    for (i64 i = 0; i < rows; i++, x += step, row += padded) {
        for (i64 j = 0; j < whole; j += LANES) store(row + j, wide(x + j));
        if (whole == padded) continue;
        Stored rest[LANES] = {};
        std::copy(x + whole, x + size, rest);
        store(row + whole, wide(rest));
    }
    return {to.data(), padded};
}

// One row, of which `size` numbers are stored.
static inline void narrowed(const REAL* row, i64 size, Stored* to) {
    const i64 whole = size / LANES * LANES;
    for (i64 j = 0; j < whole; j += LANES) narrow(to + j, load(row + j));
    if (whole == size) return;
    Stored rest[LANES];
    narrow(rest, load(row + whole));
    std::copy(rest, rest + size - whole, to + whole);
}
