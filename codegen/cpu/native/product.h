// Vectors and small dense products in registers, single-threaded. REAL is float or double.
//
// The products of one block list are too small for a BLAS call each: its dispatch would cost as much as its arithmetic.
#pragma once

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

// c[i, j] (+)= sum over k of a[i * a_row + k * a_col] * b[k * b_row + j], for ROWS rows and WIDTH vectors of columns.
template <int ROWS, int WIDTH, bool ADD>
static inline void tile(i64 depth, const REAL* a, i64 a_row, i64 a_col, const REAL* b, i64 b_row, REAL* c, i64 c_row) {
    Vector sum[ROWS][WIDTH];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; j++) sum[i][j] = ADD ? load(c + i * c_row + j * LANES) : Vector{};
    for (i64 k = 0; k < depth; k++, a += a_col, b += b_row) {
        Vector row[WIDTH];
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; j++) row[j] = load(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
            for (int j = 0; j < WIDTH; j++) sum[i][j] += a[i * a_row] * row[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < WIDTH; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

template <int ROWS, int WIDTH, bool ADD>
static inline void rows_of_tiles(i64 m, i64 depth, const REAL* a, i64 a_row, i64 a_col, const REAL* b, i64 b_row, REAL* c, i64 c_row) {
    i64 i = 0;
    for (; i + ROWS <= m; i += ROWS) tile<ROWS, WIDTH, ADD>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row);
    if constexpr (ROWS > 1)
        if (i < m) rows_of_tiles<ROWS - 1, WIDTH, ADD>(m - i, depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row);
}

// c [m, n] (+)= a [m, depth] b [depth, n]; n is a multiple of LANES.
template <bool ADD>
static void product(i64 m, i64 n, i64 depth, const REAL* a, i64 a_row, i64 a_col, const REAL* b, i64 b_row, REAL* c, i64 c_row) {
    i64 j = 0;
    if constexpr (WIDEST == 4)
        for (; j + 4 * LANES <= n; j += 4 * LANES) rows_of_tiles<6, 4, ADD>(m, depth, a, a_row, a_col, b + j, b_row, c + j, c_row);
    for (; j + 2 * LANES <= n; j += 2 * LANES)
        rows_of_tiles<(WIDEST == 4 ? 8 : 6), 2, ADD>(m, depth, a, a_row, a_col, b + j, b_row, c + j, c_row);
    for (; j < n; j += LANES) rows_of_tiles<8, 1, ADD>(m, depth, a, a_row, a_col, b + j, b_row, c + j, c_row);
}

// x [rows, size] with this row stride -> [padded, size] and, transposed and scaled, [size, padded]; zeros past the rows. Either may be null.
static void pack(const REAL* x, i64 stride, i64 rows, i64 padded, i64 size, REAL scale, REAL* plain, REAL* transposed) {
    if (plain) {
        for (i64 i = 0; i < rows; i++) memcpy(plain + i * size, x + i * stride, size * sizeof(REAL));
        memset(plain + rows * size, 0, (padded - rows) * size * sizeof(REAL));
    }
    if (transposed)
        for (i64 j = 0; j < size; j++) {
            for (i64 i = 0; i < rows; i++) transposed[j * padded + i] = x[i * stride + j] * scale;
            for (i64 i = rows; i < padded; i++) transposed[j * padded + i] = 0;
        }
}
