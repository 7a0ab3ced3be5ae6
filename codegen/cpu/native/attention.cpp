// Sparse attention over block lists, forward and backward: codegen/cpu/attention.py calls it, docs/design/operators.md defines it.
//
// Scores stand transposed, [keys, queries]: softmax then runs along the vectors of queries, without a sum across lanes, and every product
// reads keys and values row by row, where they lie or gathered. One call computes some (batch row, key head) pairs in one thread.
//
// bf16 is multiplied as it is where the processor can (operands.h), with fp32 sums; weights and the slopes of scores are rounded for it,
// as flash attention does. Elsewhere keys and values are widened for one pair at a time, all else for a chunk of queries: in the cache.
// Scores, softmax and the sums of gradients are REAL.
#include "operands.h"

// Fills out[i] for queries q .. q + rows - 1 and one key.
typedef void (*Fill)(const void* operands, i64 b, i64 h, i64 q, i64 rows, i64 k, uint8_t* out);

// Scores become a function of each, and slopes, where not null, its derivatives; count is a multiple of LANES.
typedef void (*Transform)(i64 count, REAL* scores, REAL* slopes);

struct Operand {  // of a mask, broadcastable to [b, h, n, m]
    const void* data;
    i64 b, h, q, k;
};

// Every field has 8 bytes, in the order of `_Call` in attention.py.
struct Call {
    const Stored *q, *k, *v;
    Strides q_step, k_step, v_step;
    const int32_t *ids, *counts;
    i64 heads, key_heads, n, m, size, size_v;  // numbers of a row of q and k, and of v
    i64 d, d_v;  // the same up to whole vectors
    i64 query_block, key_block, tiles, width;
    double scale;
    Transform transform;  // or null
    const REAL* key_bias;  // [.., .., m], or null
    i64 bias_b, bias_h;
    const uint8_t* certain;  // [.., .., tiles, blocks]: `fill` holds everywhere; null: ask it always
    i64 certain_b, certain_h;
    Fill fill;  // or null
    const void* fill_operands;
    Operand boolean, bias;
    double dropout_p;
    i64 seed, drops;
    REAL* lse;  // contiguous
    Stored* out;
    const Stored* grad_out;
    Stored *grad_q, *grad_k, *grad_v;  // null where not needed
    Strides out_step, grad_out_step, grad_q_step, grad_k_step, grad_v_step;
};

// A run of adjacent keys of a list: one block.
struct Run {
    i64 first, count, block;
};

struct Scratch {
    std::vector<Run> runs;
    std::vector<Number> k_rows, v_rows;  // of the list, gathered
    std::vector<Number> k, v, q, q_t, g, g_t, left, wide, wide_g;
    std::vector<REAL> scores, slope, bend, out, row;
    std::vector<uint8_t> keep;
    // Of one (batch row, key head) pair:
    std::vector<Number> all_k, all_v;
    Rows<Number> keys, values;
    std::vector<REAL> grad_k, grad_v;  // [m, d], [m, d_v]: sums, which every tile adds to
};

static void gather(const Rows<Number>& x, const std::vector<Run>& runs, i64 size, Number* to) {
    for (const Run& run : runs)
        for (i64 i = 0; i < run.count; i++, to += size) memcpy(to, x.first + (run.first + i) * x.step, size * sizeof(Number));
}

static void lay_list(const Rows<Number>& x, const std::vector<Run>& runs, i64 size, Number* to) {
    i64 row = 0;
    for (const Run& run : runs)
        for (i64 i = 0; i < run.count; i++) lay(x.first + (run.first + i) * x.step, size, row++, to);
}

// Words of Philox4x32-10, as in codegen/reference/random.py.
static inline void philox(uint64_t counter, uint64_t seed, uint32_t words[4]) {
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0, k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; i++) {
        const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        const uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1, c3 = (uint32_t)p0, c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// keep[key * padded + i]: whether dropout keeps query `first` + i of head h at that key.
static void survivors(const Call& c, const std::vector<Run>& runs, i64 b, i64 h, i64 first, i64 rows, i64 padded, uint8_t* keep) {
    const uint64_t threshold = (uint64_t)std::nearbyint(c.dropout_p * 4294967296.0);
    for (i64 i = 0; i < rows; i++) {
        uint8_t* at = keep + i;
        const uint64_t start = (uint64_t)(((b * c.heads + h) * c.n + first + i) * c.m);
        for (const Run& run : runs) {
            uint32_t words[4];
            uint64_t known = ~0ull;
            for (i64 j = 0; j < run.count; j++, at += padded) {
                const uint64_t index = start + run.first + j;
                if (index >> 2 != known) philox(known = index >> 2, (uint64_t)c.seed, words);
                *at = words[index & 3] >= threshold;
            }
        }
    }
}

// Adds the mask to scores [keys, padded] of queries `first` .. `first` + rows - 1 of head h.
static void hide(const Call& c, const std::vector<Run>& runs, i64 b, i64 h, i64 tile, i64 first, i64 rows, i64 padded, REAL* scores) {
    const i64 key_head = h / (c.heads / c.key_heads), blocks = (c.m + c.key_block - 1) / c.key_block;
    uint8_t shown[CHUNK];
    REAL* row = scores;
    for (const Run& run : runs) {
        const uint8_t* sure = c.certain ? c.certain + b * c.certain_b + key_head * c.certain_h + tile * blocks + run.block : nullptr;
        const bool ask = c.fill && !(sure && *sure);
        for (i64 j = 0; j < run.count; j++, row += padded) {
            const i64 key = run.first + j;
            if (c.key_bias) {
                const REAL bias = c.key_bias[b * c.bias_b + key_head * c.bias_h + key];
                // A hidden key counts nothing, whatever its score is.
                for (i64 i = 0; i < padded; i += LANES) store(row + i, bias == -INF ? spread(bias) : load(row + i) + bias);
            }
            if (ask) {
                c.fill(c.fill_operands, b, h, first, rows, key, shown);
                for (i64 i = 0; i < rows; i++) row[i] = shown[i] ? row[i] : -INF;
            }
            if (c.boolean.data) {
                const uint8_t* p = (const uint8_t*)c.boolean.data + b * c.boolean.b + h * c.boolean.h + first * c.boolean.q + key * c.boolean.k;
                for (i64 i = 0; i < rows; i++) row[i] = p[i * c.boolean.q] ? row[i] : -INF;
            }
            if (c.bias.data) {  // masked values are -inf in it
                const REAL* p = (const REAL*)c.bias.data + b * c.bias.b + h * c.bias.h + first * c.bias.q + key * c.bias.k;
                for (i64 i = 0; i < rows; i++) row[i] = p[i * c.bias.q] == -INF ? -INF : row[i] + p[i * c.bias.q];
            }
        }
    }
}

// Some queries of one head with the keys of their list.
struct Chunk {
    i64 b, h, tile, first, rows, padded, keys;
};

static bool masked(const Call& c) { return c.key_bias || c.fill || c.boolean.data || c.bias.data; }

// Products with the keys of a list read large blocks where they lie; the rows of small ones are gathered first.
static bool in_place(const Call& c) { return c.key_block >= 8; }

// scores [keys, padded] = scale times the list's rows of x [m, size] times columns [size, padded]. gathered: they, if not in_place.
static void with_keys(const Call& c, const Scratch& s, const Chunk& chunk, const Rows<Number>& x, const Number* gathered, i64 size,
                      const Number* columns, REAL scale, REAL* scores) {
    const i64 padded = chunk.padded, step = padded * TOGETHER;
    if (!in_place(c)) return product<false>(chunk.keys, padded, size, gathered, size, TOGETHER, columns, step, scores, padded, scale);
    for (const Run& run : s.runs) {
        product<false>(run.count, padded, size, x.first + run.first * x.step, x.step, TOGETHER, columns, step, scores, padded, scale);
        scores += run.count * padded;
    }
}

static void score(const Call& c, Scratch& s, const Chunk& x, bool backward) {
    Number* q_t = take(s.q_t, c.d * x.padded);
    const Rows<Number> queries = whole_rows(at(c.q, c.q_step, x.b, x.h, x.first), c.q_step.row, x.rows, c.size, s.wide);
    turn(queries, x.rows, x.padded, c.d, q_t);
    if (backward) lay(queries, x.rows, x.padded, c.d, take(s.q, x.padded * c.d));
    REAL* scores = take(s.scores, x.keys * x.padded);
#if MULTIPLIES_BF16
    const REAL scale = (REAL)c.scale;  // of scores, which are not rounded to bf16
#else
    const REAL scale = 1;
    for (i64 i = 0; i < c.d * x.padded; i += LANES) store(q_t + i, load(q_t + i) * (REAL)c.scale);
#endif
    with_keys(c, s, x, s.keys, s.k_rows.data(), c.d, q_t, scale, scores);
    if (c.transform) c.transform(x.keys * x.padded, scores, backward ? take(s.bend, x.keys * x.padded) : nullptr);
    if (masked(c)) hide(c, s.runs, x.b, x.h, x.tile, x.first, x.rows, x.padded, scores);
    if (c.drops) {
        if ((i64)s.keep.size() < x.keys * x.padded) s.keep.resize(x.keys * x.padded);
        survivors(c, s.runs, x.b, x.h, x.first, x.rows, x.padded, s.keep.data());
    }
}

static REAL keep_scale(const Call& c) { return c.dropout_p == 1.0 ? 0 : (REAL)(1.0 / (1.0 - c.dropout_p)); }

static void drop(const Call& c, const Scratch& s, const Chunk& x, REAL* values) {
    const REAL scale = keep_scale(c);
    for (i64 i = 0; i < x.keys; i++)
        for (i64 j = 0; j < x.rows; j++) values[i * x.padded + j] *= s.keep[i * x.padded + j] ? scale : 0;
}

static void forward_chunk(const Call& c, Scratch& s, const Chunk& x) {
    score(c, s, x, false);
    REAL* scores = s.scores.data();
    REAL *greatest = take(s.row, 2 * CHUNK), *total = greatest + CHUNK;
    for (i64 j = 0; j < x.padded; j += LANES) {
        Vector most = spread(-INF), sum = Vector{};
        for (i64 i = 0; i < x.keys; i++) most = greater(load(scores + i * x.padded + j), most);
        const Vector from = most == spread(-INF) ? Vector{} : most;  // a query without keys: every exponential is then 0
        for (i64 i = 0; i < x.keys; i++) {
            REAL* p = scores + i * x.padded + j;
            const Vector e = exponential(load(p) - from);
            store(p, e);
            sum += e;
        }
        store(greatest + j, from);
        store(total + j, sum);
    }
    if (c.drops) drop(c, s, x, scores);
    REAL* out = take(s.out, x.padded * c.d_v);
    const Number* weights = by_columns(scores, x.keys, x.padded, s.left);
    product<false>(x.rows, c.d_v, x.keys, weights, TOGETHER, x.padded * TOGETHER, s.v.data(), c.d_v * TOGETHER, out, c.d_v);
    REAL* lse = c.lse + (x.b * c.heads + x.h) * c.n + x.first;
    for (i64 i = 0; i < x.rows; i++) {
        const bool empty = total[i] == 0;
        lse[i] = empty ? -INF : greatest[i] + std::log(total[i]);
        const Vector share = spread(empty ? 0 : 1 / total[i]);
        REAL* row = out + i * c.d_v;
        for (i64 j = 0; j < c.d_v; j += LANES) store(row + j, empty ? Vector{} : load(row + j) * share);
        narrowed(row, c.size_v, at(c.out, c.out_step, x.b, x.h, x.first + i));
    }
}

// Adds left [keys, padded] times right [padded, size] to the rows of `total` [m, size] that the list's keys are.
static void add_to_keys(const Scratch& s, const Number* left, i64 padded, const Number* right, i64 size, REAL* total) {
    i64 key = 0;
    for (const Run& run : s.runs) {
        const Number* rows = left + key * padded;
        product<true>(run.count, size, padded, rows, padded, TOGETHER, right, size * TOGETHER, total + run.first * size, size);
        key += run.count;
    }
}

static void backward_chunk(const Call& c, Scratch& s, const Chunk& x) {
    score(c, s, x, true);
    const i64 row = (x.b * c.heads + x.h) * c.n + x.first;
    REAL *scores = s.scores.data(), *slope = take(s.slope, x.keys * x.padded);
    Number *g = take(s.g, x.padded * c.d_v), *g_t = take(s.g_t, c.d_v * x.padded);
    REAL *lse = take(s.row, 2 * CHUNK), *delta = lse + CHUNK;
    const Stored *grad = at(c.grad_out, c.grad_out_step, x.b, x.h, x.first), *out = at<const Stored>(c.out, c.out_step, x.b, x.h, x.first);
    const Rows<Number> grads = whole_rows(grad, c.grad_out_step.row, x.rows, c.size_v, s.wide_g);
    const Rows<Number> outs = whole_rows(out, c.out_step.row, x.rows, c.size_v, s.wide);
    turn(grads, x.rows, x.padded, c.d_v, g_t);
    lay(grads, x.rows, x.padded, c.d_v, g);
    for (i64 i = 0; i < x.padded; i++) {
        Vector sum = {};
        if (i < x.rows)
            for (i64 j = 0; j < c.d_v; j += LANES) sum += wide(grads.first + i * grads.step + j) * wide(outs.first + i * outs.step + j);
        delta[i] = 0;
        for (i64 l = 0; l < LANES; l++) delta[i] += sum[l];
        lse[i] = i < x.rows && c.lse[row + i] != -INF ? c.lse[row + i] : INF;  // exp(-inf): no weight
    }
    if (c.grad_q || c.grad_k)
        with_keys(c, s, x, s.values, s.v_rows.data(), c.d_v, g_t, 1, slope);
    const REAL kept = c.drops ? keep_scale(c) : 1;
    for (i64 i = 0; i < x.keys; i++) {
        REAL *p = scores + i * x.padded, *t = slope + i * x.padded;
        const REAL* bend = c.transform ? s.bend.data() + i * x.padded : nullptr;
        const uint8_t* keep = c.drops ? s.keep.data() + i * x.padded : nullptr;
        for (i64 j = 0; j < x.padded; j += LANES) {
            Vector weight = exponential(load(p + j) - load(lse + j)), factor = spread((REAL)c.scale);
            if (bend) factor *= load(bend + j);
            if (j + LANES > x.rows)
                for (i64 l = std::max<i64>(0, x.rows - j); l < LANES; l++) weight[l] = factor[l] = 0;  // zero times an infinite key would be NaN
            Vector passed = spread(kept);
            if (keep)
                for (i64 l = 0; l < LANES; l++) passed[l] = j + l < x.rows && keep[j + l] ? kept : 0;
            store(t + j, weight * (load(t + j) * passed - load(delta + j)) * factor);
            store(p + j, weight * passed);
        }
    }
    if (c.grad_v) add_to_keys(s, by_rows(scores, x.keys, x.padded, s.left), x.padded, g, c.d_v, s.grad_v.data());
    if (c.grad_q) {
        REAL* grad_q = take(s.out, x.rows * c.d);
        const Number* slopes = by_columns(slope, x.keys, x.padded, s.left);
        product<false>(x.rows, c.d, x.keys, slopes, TOGETHER, x.padded * TOGETHER, s.k.data(), c.d * TOGETHER, grad_q, c.d);
        for (i64 i = 0; i < x.rows; i++) narrowed(grad_q + i * c.d, c.size, at(c.grad_q, c.grad_q_step, x.b, x.h, x.first + i));
    }
    if (c.grad_k) add_to_keys(s, by_rows(slope, x.keys, x.padded, s.left), x.padded, s.q.data(), c.d, s.grad_k.data());
}

static void round_sums(const Call& c, const std::vector<REAL>& sums, i64 padded, i64 size, Stored* to, const Strides& step, i64 b, i64 h) {
    for (i64 i = 0; i < c.m; i++) narrowed(sums.data() + i * padded, size, at(to, step, b, h, i));
}

static void lists(const Call& c, i64 b, i64 key_head, bool backward, Scratch& s) {
    const i64 group = c.heads / c.key_heads;
    // Copies of a head's rows in 16 bits lie side by side: up to a tenth faster. In 32 bits they were not.
    const bool apart = TOGETHER == 1;
    s.keys = whole_rows(at(c.k, c.k_step, b, key_head, 0), c.k_step.row, c.m, c.size, s.all_k, apart);
    s.values = whole_rows(at(c.v, c.v_step, b, key_head, 0), c.v_step.row, c.m, c.size_v, s.all_v, apart);
    if (backward && c.grad_k) s.grad_k.assign(c.m * c.d, 0);
    if (backward && c.grad_v) s.grad_v.assign(c.m * c.d_v, 0);
    for (i64 tile = 0; tile < c.tiles; tile++) {
        const i64 list = (b * c.key_heads + key_head) * c.tiles + tile;
        i64 keys = 0;
        s.runs.clear();
        for (i64 slot = 0; slot < c.counts[list]; slot++) {
            const i64 block = c.ids[list * c.width + slot], first = block * c.key_block, count = std::min(c.key_block, c.m - first);
            s.runs.push_back({first, count, block});
            keys += count;
        }
        const i64 laid = up_to(keys, TOGETHER);
        if (!in_place(c)) gather(s.keys, s.runs, c.d, take(s.k_rows, keys * c.d));
        if (!in_place(c) && backward) gather(s.values, s.runs, c.d_v, take(s.v_rows, keys * c.d_v));
        if (backward)
            lay_list(s.keys, s.runs, c.d, take(s.k, laid * c.d));
        else
            lay_list(s.values, s.runs, c.d_v, take(s.v, laid * c.d_v));
        const i64 stop = std::min(c.n, (tile + 1) * c.query_block);
        for (i64 h = key_head * group; h < (key_head + 1) * group; h++)
            for (i64 first = tile * c.query_block; first < stop; first += CHUNK) {
                const i64 rows = std::min(CHUNK, stop - first);
                const Chunk chunk = {b, h, tile, first, rows, up_to(rows, LANES), keys};
                backward ? backward_chunk(c, s, chunk) : forward_chunk(c, s, chunk);
            }
    }
    if (backward && c.grad_k) round_sums(c, s.grad_k, c.d, c.size, c.grad_k, c.grad_k_step, b, key_head);
    if (backward && c.grad_v) round_sums(c, s.grad_v, c.d_v, c.size_v, c.grad_v, c.grad_v_step, b, key_head);
}

extern "C" i64 lanes() { return LANES; }

static thread_local Scratch scratch;  // of a thread's calls, until it releases it: memory that is new costs a page fault every 4 KiB

extern "C" void release() { scratch = Scratch(); }

// Computes pairs [start, stop) of batch row and key head, numbered b * key_heads + h.
extern "C" void attend(const Call* call, i64 start, i64 stop, i64 backward) {
    for (i64 pair = start; pair < stop; pair++) lists(*call, pair / call->key_heads, pair % call->key_heads, backward, scratch);
}
