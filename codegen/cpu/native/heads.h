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

template <typename T>
static T* take(std::vector<T>& x, i64 size) {
    if ((i64)x.size() < size) x.resize(size);
    return x.data();
}

static inline Vector wide(const REAL* p) { return load(p); }

#if STORED_IS_BF16
typedef uint16_t Stored;  // the upper half of a float
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

static inline Words words(const Stored* p) {
#if defined(__AVX512F__)
    return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));  // GCC makes two halves of a conversion
#else
    return __builtin_convertvector(*(const LooseHalves*)p, Words);
#endif
}

static inline Vector wide(const Stored* p) { return (Vector)(words(p) << 16); }

// To the nearest, of two equally near ones the even.
static inline Halves rounded(Vector x) {
#if MULTIPLIES_BF16
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    const Words bits = (Words)x, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((x == x) ? nearest : Words{} + 0x7fc0, Halves);
#endif
}

static inline void narrow(Stored* p, Vector x) { *(LooseHalves*)p = rounded(x); }
#else
typedef REAL Stored;

static inline void narrow(Stored* p, Vector x) { store(p, x); }
#endif

template <typename T>
struct Rows {
    const T* first;
    i64 step;
};

static inline void copy_vector(const Stored* from, REAL* to) { store(to, wide(from)); }
#if STORED_IS_BF16
static inline void copy_vector(const Stored* from, Stored* to) { memcpy(to, from, LANES * sizeof(Stored)); }
#endif

// Rows as T, REAL or what is stored, zeros behind each up to whole vectors: where they lie, if they can and may, or copies in `to`.
template <typename T>
static Rows<T> whole_rows(const Stored* x, i64 step, i64 rows, i64 size, std::vector<T>& to, bool in_place = true) {
    const bool grouped = step % GROUP<T> == 0 && (uintptr_t)x % (GROUP<T> * sizeof(T)) == 0;
    if (std::is_same<T, Stored>::value && size % LANES == 0 && grouped && in_place) return {(const T*)x, step};
    const i64 padded = up_to(size, LANES), whole = size / LANES * LANES;
    T* row = take(to, rows * padded);
    for (i64 i = 0; i < rows; i++, x += step, row += padded) {
        for (i64 j = 0; j < whole; j += LANES) copy_vector(x + j, row + j);
        if (whole == padded) continue;
        Stored rest[LANES] = {};
        std::copy(x + whole, x + size, rest);
        copy_vector(rest, row + whole);
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
