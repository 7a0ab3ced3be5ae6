// How attention's matrices lie in memory as operands of products: in REAL as they are; in bf16, where the processor multiplies it, in pairs.
//
// Left operands are rows as they are, [rows, depth], or columns, [depth / TOGETHER, rows, TOGETHER]; right ones are
// [depth / TOGETHER, columns, TOGETHER]. With TOGETHER = 1 these are the matrix and its transpose.
#pragma once

#include "heads.h"

#if MULTIPLIES_BF16
typedef Half Number;  // what products read
#else
typedef REAL Number;
#endif
constexpr i64 TOGETHER = GROUP<Number>;

// Row `row` of a right operand with `size` columns. Rows come in ascending order; behind the last of an odd number stand zeros.
static inline void lay(const Number* from, i64 size, i64 row, Number* to) {
#if MULTIPLIES_BF16
    Half* at = to + row / 2 * size * 2;
    for (i64 j = 0; j < size; j += LANES, at += 2 * LANES) {
        const Words x = words(from + j);
        store((REAL*)at, (Vector)(row % 2 ? (Words)load((const REAL*)at) | x << 16 : x));
    }
#else
    memcpy(to + row * size, from, size * sizeof(Number));
#endif
}

// Rows [rows, size] as a right operand whose depth they are, zeros up to `padded`.
static void lay(const Rows<Number>& x, i64 rows, i64 padded, i64 size, Number* to) {
    for (i64 i = 0; i < rows; i++) lay(x.first + i * x.step, size, i, to);
    const i64 written = up_to(rows, TOGETHER);
    memset(to + written * size, 0, (padded - written) * size * sizeof(Number));
}

// Rows [rows, size] as a right operand whose columns they are, zeros up to `padded` columns.
static void turn(const Rows<Number>& x, i64 rows, i64 padded, i64 size, Number* to) {
    transpose((const REAL*)x.first, x.step / TOGETHER, rows, size / TOGETHER, (REAL*)to, padded);
}

// x [depth, padded] as a left operand: of rows, or of columns.
static const Number* by_rows(const REAL* x, i64 depth, i64 padded, std::vector<Number>& to) {
#if MULTIPLIES_BF16
    Half* at = take(to, depth * padded);
    for (i64 i = 0; i < depth * padded; i += LANES) narrow(at + i, load(x + i));
    return at;
#else
    return x;
#endif
}

static const Number* by_columns(const REAL* x, i64 depth, i64 padded, std::vector<Number>& to) {
#if MULTIPLIES_BF16
    Half* at = take(to, up_to(depth, 2) * padded);
    uint16_t places[32];
    for (int i = 0; i < 32; i++) places[i] = i / 2 + i % 2 * 16;
    const __m512i alternate = _mm512_loadu_si512(places);
    for (i64 i = 0; i < depth; i += 2)
        for (i64 j = 0; j < padded; j += LANES) {
            const Vector first = load(x + i * padded + j), second = i + 1 < depth ? load(x + (i + 1) * padded + j) : Vector{};
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
            _mm512_storeu_si512(at + i * padded + 2 * j, _mm512_permutexvar_epi16(alternate, both));
        }
    return at;
#else
    return x;
#endif
}
