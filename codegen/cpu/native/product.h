// Vectors, transposes and dense products in registers, single-threaded. REAL is float or double.
//
// The products of one block list are too small for a BLAS call each: its dispatch would cost as much as its arithmetic.
#pragma once

#if STORED_IS_BF16 && defined(__AVX512BF16__)
#define MULTIPLIES_BF16 1
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, WIDEST = 4;  // 32 registers: 6 x 4 or 8 x 2 accumulators
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, WIDEST = 2;  // 16 registers: 6 x 2
#else
constexpr int VECTOR_BYTES = 16, WIDEST = 2;
#endif

typedef int64_t i64;
typedef REAL Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL Loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));  // in memory, at any address
constexpr i64 LANES = VECTOR_BYTES / sizeof(REAL);
constexpr REAL INF = std::numeric_limits<REAL>::infinity();

static inline Vector load(const REAL* p) { return *(const Loose*)p; }
static inline void store(REAL* p, Vector x) { *(Loose*)p = x; }
static inline Vector spread(REAL x) { return Vector{} + x; }
static inline Vector greater(Vector a, Vector b) { return a > b ? a : b; }

static inline i64 up_to(i64 x, i64 step) { return (x + step - 1) / step * step; }

// e^x, and exactly 0 far below the least positive number; x <= 0 is assumed to be the common case, NaN stays NaN.
static inline Vector exponential(Vector x) {
#if REAL_IS_FLOAT
    typedef int32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
    const Vector low = spread(-87.0f), high = spread(88.0f);
    Vector y = x < low ? low : x;
    y = y > high ? high : y;
    const Vector shifted = y * 1.44269504088896341f + 12582912.0f;  // the mantissa's low bits hold round(y / ln 2)
    const Vector n = shifted - 12582912.0f;
    const Vector r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = spread(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Vector power = (Vector)(((Bits)shifted - 0x4b400000 + 127) << 23);
    return x < low ? Vector{} : p * power;
#else
    Vector y;
    for (int i = 0; i < LANES; i++) y[i] = std::exp(x[i]);
    return y;
#endif
}

// Products read numbers of type T, and sum in REAL. GROUP<T> numbers that a sum meets one after the other lie side by side in both.
template <typename T>
constexpr i64 GROUP = 1;

static inline Vector factors(const REAL* p) { return load(p); }
static inline Vector plus_product(Vector sum, const REAL* a, Vector b) { return sum + *a * b; }

#if MULTIPLIES_BF16
typedef uint16_t Half;  // bf16: the upper half of a float

template <>
constexpr i64 GROUP<Half> = 2;

static inline __m512bh factors(const Half* p) { return (__m512bh)_mm512_loadu_si512(p); }

static inline Vector plus_product(Vector sum, const Half* a, __m512bh b) {
    int32_t pair;
    memcpy(&pair, a, sizeof pair);
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), b);
}
#endif

// c[i, j] = scale * sum over k of a[i, k] * b[k, j], or c[i, j] += that sum, for ROWS rows and WIDTH vectors of columns. Group g of row i
// of a is at a + i * a_row + g * a_col, that of column j of b at b + g * b_row + j * GROUP.
template <int ROWS, int WIDTH, bool ADD, typename T>
static inline void tile(i64 depth, const T* a, i64 a_row, i64 a_col, const T* b, i64 b_row, REAL* c, i64 c_row, REAL scale) {
    Vector sum[ROWS][WIDTH];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; j++) sum[i][j] = ADD ? load(c + i * c_row + j * LANES) : Vector{};
    for (i64 k = 0; k < depth; k += GROUP<T>, a += a_col, b += b_row) {
        decltype(factors(b)) row[WIDTH];
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; j++) row[j] = factors(b + j * LANES * GROUP<T>);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < WIDTH; j++) sum[i][j] = plus_product(sum[i][j], a + i * a_row, row[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; j++) store(c + i * c_row + j * LANES, ADD ? sum[i][j] : sum[i][j] * scale);
}

template <int ROWS, int WIDTH, bool ADD, typename T>
static inline void rows_of_tiles(i64 m, i64 depth, const T* a, i64 a_row, i64 a_col, const T* b, i64 b_row, REAL* c, i64 c_row,
                                 REAL scale) {
    i64 i = 0;
    for (; i + ROWS <= m; i += ROWS) tile<ROWS, WIDTH, ADD>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, scale);
    if constexpr (ROWS > 1)
        if (i < m) rows_of_tiles<ROWS - 1, WIDTH, ADD>(m - i, depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row, scale);
}

// c [m, n] = scale * a [m, depth] b [depth, n], or c += a b; n is a multiple of LANES. Of an incomplete group the rest is zero in a and b.
template <bool ADD, typename T>
static void product(i64 m, i64 n, i64 depth, const T* a, i64 a_row, i64 a_col, const T* b, i64 b_row, REAL* c, i64 c_row,
                    REAL scale = 1) {
    i64 j = 0;
    if constexpr (WIDEST == 4)
        for (; j + 4 * LANES <= n; j += 4 * LANES)
            rows_of_tiles<6, 4, ADD>(m, depth, a, a_row, a_col, b + j * GROUP<T>, b_row, c + j, c_row, scale);
    for (; j + 2 * LANES <= n; j += 2 * LANES)
        rows_of_tiles<(WIDEST == 4 ? 8 : 6), 2, ADD>(m, depth, a, a_row, a_col, b + j * GROUP<T>, b_row, c + j, c_row, scale);
    for (; j < n; j += LANES) rows_of_tiles<8, 1, ADD>(m, depth, a, a_row, a_col, b + j * GROUP<T>, b_row, c + j, c_row, scale);
}

#if defined(__clang__)
static inline void transpose(const REAL* from, i64 from_row, REAL* to, i64 to_row) {
    for (i64 i = 0; i < LANES; i++)
        for (i64 j = 0; j < LANES; j++) to[j * to_row + i] = from[i * from_row + j];
}
#else
#if REAL_IS_FLOAT
typedef int32_t Places __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int64_t Places __attribute__((vector_size(VECTOR_BYTES)));
#endif

// Exchanges the halves of size HALF between rows that lie HALF apart, then the halves of those halves.
template <int HALF>
static inline void exchange(Vector (&rows)[LANES]) {
    Places first, second;
    for (int l = 0; l < LANES; l++) first[l] = l & HALF ? l - HALF + LANES : l, second[l] = l & HALF ? l + LANES : l + HALF;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & HALF)) {
            const Vector a = rows[i], b = rows[i + HALF];
            rows[i] = __builtin_shuffle(a, b, first);
            rows[i + HALF] = __builtin_shuffle(a, b, second);
        }
    if constexpr (HALF > 1) exchange<HALF / 2>(rows);
}

// to [LANES, LANES] = transposed from.
static inline void transpose(const REAL* from, i64 from_row, REAL* to, i64 to_row) {
    Vector rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) rows[i] = load(from + i * from_row);
    exchange<LANES / 2>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * to_row, rows[i]);
}
#endif

// to [columns, padded] = transposed from [rows, columns], zeros past the rows; padded is a multiple of LANES.
static void transpose(const REAL* from, i64 from_row, i64 rows, i64 columns, REAL* to, i64 padded) {
    const i64 whole_rows = rows / LANES * LANES, whole_columns = columns / LANES * LANES;
    for (i64 i = 0; i < whole_rows; i += LANES) {
        for (i64 j = 0; j < whole_columns; j += LANES) transpose(from + i * from_row + j, from_row, to + j * padded + i, padded);
        for (i64 j = whole_columns; j < columns; j++)
            for (i64 l = i; l < i + LANES; l++) to[j * padded + l] = from[l * from_row + j];
    }
    if (whole_rows == padded) return;
    for (i64 j = 0; j < columns; j++)
        for (i64 i = whole_rows; i < padded; i++) to[j * padded + i] = i < rows ? from[i * from_row + j] : 0;
}
