// Dense products of rows picked from larger matrices, added to rows of another: codegen/cpu/products.py calls it.
#include "product.h"

#include <algorithm>
#include <vector>

constexpr i64 DEPTH = 512, ROWS_AT_A_TIME = 96;  // a panel of the right operand, and some rows of the left one, stay in the cache

struct Term {  // row i of the left operand is a + (index ? index[i] : i) * a_row, its elements adjacent; the right one is [depth, columns]
    const REAL* a;
    i64 a_row;
    const int32_t* index;
    const REAL* w;
    i64 w_row, w_column, depth;
};

// Every field has 8 bytes, in the order of `_Call` in products.py.
struct Call {
    const Term* terms;
    i64 count, rows, columns;
    const REAL* start;  // [columns]: what each row starts from, if it does not start from what is in it; null: zero
    i64 add;
    REAL* out;
    i64 out_row;
    const int32_t* index;
};

struct Slice {  // of a term: some of its depth, its part of the right operand packed as panels [columns / PANEL, depth, PANEL]
    const Term* term;
    i64 from, depth;
    const REAL* packed;
};

constexpr i64 PANEL = WIDEST * LANES;

static i64 row_of(const int32_t* index, i64 i) { return index ? index[i] : i; }

static void pack_panels(const Slice& s, i64 columns, REAL* to) {
    const Term& t = *s.term;
    for (i64 j = 0; j < columns; j += PANEL, to += s.depth * PANEL) {
        const i64 width = std::min(PANEL, columns - j);
        const REAL* from = t.w + s.from * t.w_row + j * t.w_column;
        if (t.w_row == 1) {
            transpose(from, t.w_column, width, s.depth, to, PANEL);
            continue;
        }
        for (i64 k = 0; k < s.depth; k++) {
            REAL* row = to + k * PANEL;
            if (t.w_column == 1)
                memcpy(row, from + k * t.w_row, width * sizeof(REAL));
            else
                for (i64 l = 0; l < width; l++) row[l] = from[k * t.w_row + l * t.w_column];
            memset(row + width, 0, (PANEL - width) * sizeof(REAL));
        }
    }
}

// ROWS rows from `first` and WIDTH vectors of columns from `column` on, `valid` columns of which are there.
template <int ROWS, int WIDTH>
static void tile_of_rows(const Call& c, const std::vector<Slice>& slices, bool add, i64 first, i64 column, i64 valid) {
    Vector sum[ROWS][WIDTH];
    REAL* out[ROWS];
    REAL edge[WIDTH * LANES] = {};
    for (int i = 0; i < ROWS; i++) {
        out[i] = c.out + row_of(c.index, first + i) * c.out_row + column;
        const REAL* from = add ? out[i] : c.start ? c.start + column : nullptr;
        if (from && valid < WIDTH * LANES) from = (const REAL*)memcpy(edge, from, valid * sizeof(REAL));
        for (int j = 0; j < WIDTH; j++) sum[i][j] = from ? load(from + j * LANES) : Vector{};
    }
    for (const Slice& s : slices) {
        const REAL *a[ROWS], *b = s.packed + column / PANEL * PANEL * s.depth + column % PANEL;
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) a[i] = s.term->a + row_of(s.term->index, first + i) * s.term->a_row + s.from;
        for (i64 k = 0; k < s.depth; k++, b += PANEL) {
            Vector row[WIDTH];
#pragma GCC unroll 4
            for (int j = 0; j < WIDTH; j++) row[j] = load(b + j * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
                for (int j = 0; j < WIDTH; j++) sum[i][j] += a[i][k] * row[j];
        }
    }
    for (int i = 0; i < ROWS; i++) {
        REAL* to = valid < WIDTH * LANES ? edge : out[i];
        for (int j = 0; j < WIDTH; j++) store(to + j * LANES, sum[i][j]);
        if (to == edge) memcpy(out[i], edge, valid * sizeof(REAL));
    }
}

template <int ROWS, int WIDTH>
static void rows_from(const Call& c, const std::vector<Slice>& slices, bool add, i64 first, i64 stop, i64 column, i64 valid) {
    for (; first + ROWS <= stop; first += ROWS) tile_of_rows<ROWS, WIDTH>(c, slices, add, first, column, valid);
    if constexpr (ROWS > 1)
        if (first < stop) rows_from<ROWS - 1, WIDTH>(c, slices, add, first, stop, column, valid);
}

static void multiply(const Call& c, const std::vector<Slice>& slices, bool add) {
    for (i64 first = 0; first < c.rows; first += ROWS_AT_A_TIME) {
        const i64 stop = std::min(first + ROWS_AT_A_TIME, c.rows);
        i64 j = 0;
        const auto left = [&] { return c.columns - j; };
        for (; left() > 2 * LANES && WIDEST == 4; j += 4 * LANES) rows_from<6, WIDEST>(c, slices, add, first, stop, j, std::min(left(), 4 * LANES));
        for (; left() > LANES; j += 2 * LANES) rows_from<(WIDEST == 4 ? 8 : 6), 2>(c, slices, add, first, stop, j, std::min(left(), 2 * LANES));
        if (left() > 0) rows_from<8, 1>(c, slices, add, first, stop, j, left());
    }
}

// out[index[i]] (+)= start + sum over terms of a[i] w, in one thread. Rows of `index` are distinct.
extern "C" void multiply_rows(const Call* call) {
    const Call& c = *call;
    std::vector<Slice> slices;
    static thread_local std::vector<REAL> packed;
    bool add = c.add;
    const i64 padded = up_to(c.columns, PANEL);
    i64 term = 0, from = 0;
    while (term < c.count || (slices.empty() && !add)) {
        i64 depth = 0;
        slices.clear();
        while (term < c.count && depth < DEPTH) {
            const Term& t = c.terms[term];
            const i64 some = std::min(t.depth - from, DEPTH - depth);
            slices.push_back({&t, from, some, nullptr});
            depth += some, from += some;
            if (from == t.depth) term++, from = 0;
        }
        if ((i64)packed.size() < depth * padded) packed.resize(depth * padded);
        REAL* to = packed.data();
        for (Slice& s : slices) {
            s.packed = to;
            pack_panels(s, c.columns, to);
            to += s.depth * padded;
        }
        multiply(c, slices, add);
        add = true;
    }
}
