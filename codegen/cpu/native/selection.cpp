// Selection of key blocks: codeword histograms or pooled queries, then the best blocks of each tile. codegen/cpu/selection.py calls it.
#include "heads.h"

// Every field has 8 bytes, in the order of `_Call` in selection.py.
struct Call {
    const Stored *q, *k;
    Strides q_step, k_step;
    i64 batch, heads, key_heads, n, m, d, query_block, key_block, run, tiles, blocks, width;
    double scale;
    i64 own;
    const uint8_t* visible;  // [.., .., m], or null
    i64 visible_b, visible_h;
    const uint8_t* allowed;  // [.., .., tiles, blocks]
    i64 allowed_b, allowed_h;
    const REAL* words;  // [key_heads, subspaces, codewords, d / subspaces]; null: the pooled selector
    i64 subspaces, codewords, q_stride, k_stride;
    REAL *sums, *counts;  // statistics of every q_stride-th query and k_stride-th key, or null
    int32_t *ids, *lengths;
};

static const uint8_t* visible(const Call& c, i64 b, i64 head) {
    return c.visible ? c.visible + b * c.visible_b + head * c.visible_h : nullptr;
}

// Adds codes of x's rows to histograms: of subspace s, codeword e and run r at out[(s * codewords + e) * code_step + r * run_step]. A code is
// the nearest codeword's number: that of the greatest x.c + offset, offset = -|c|^2 / 2, the lower of equals.
static void encode(const Call& c, const Stored* x, i64 row_step, i64 rows, i64 head, const uint8_t* shown, i64 run, i64 stride,
                   const std::vector<REAL>& offsets, REAL* out, i64 code_step, i64 run_step) {
    const i64 size = c.d / c.subspaces, books = head * c.subspaces * c.codewords;
    std::vector<REAL> x_t(c.d * CHUNK), similarity(c.codewords * CHUNK), wide;
    REAL codes[CHUNK];
    for (i64 first = 0; first < rows; first += CHUNK) {
        const i64 count = std::min(CHUNK, rows - first), lanes = up_to(count, LANES);
        const Rows<REAL> part = whole_rows(x + first * row_step, row_step, count, c.d, wide);
        transpose(part.first, part.step, count, c.d, x_t.data(), lanes);
        for (i64 s = 0; s < c.subspaces; s++) {
            const REAL *words = c.words + (books + s * c.codewords) * size, *offset = offsets.data() + s * c.codewords;
            product<false>(c.codewords, lanes, size, words, size, 1, x_t.data() + s * size * lanes, lanes, similarity.data(), lanes);
            for (i64 j = 0; j < lanes; j += LANES) {
                Vector best = spread(-INF), code = Vector{};
                for (i64 e = 0; e < c.codewords; e++) {
                    const Vector y = load(similarity.data() + e * lanes + j) + offset[e];
                    code = y > best ? spread((REAL)e) : code;
                    best = greater(y, best);
                }
                store(codes + j, code);
            }
            for (i64 i = 0; i < count; i++) {
                const i64 row = first + i, code = s * c.codewords + (i64)codes[i];
                if (shown && !shown[row]) continue;
                out[code * code_step + row / run * run_step] += 1;
                if (c.sums && row % stride == 0) {
                    c.counts[books + code] += 1;
                    REAL* sum = c.sums + (books + code) * size;
                    for (i64 t = 0; t < size; t++) sum[t] += part.first[i * part.step + s * size + t];
                }
            }
        }
    }
}

// scores [tiles, padded]: how often the codes of a tile's queries and a block's keys agree.
static void agreements(const Call& c, i64 b, i64 head, REAL* scores, i64 padded) {
    const i64 all = c.subspaces * c.codewords, size = c.d / c.subspaces, group = c.heads / c.key_heads;
    std::vector<REAL> offsets(all), queries(c.tiles * all), keys(all * padded);
    for (i64 i = 0; i < all; i++) {
        const REAL* word = c.words + (head * all + i) * size;
        for (i64 t = 0; t < size; t++) offsets[i] -= word[t] * word[t] / 2;
    }
    for (i64 h = head * group; h < (head + 1) * group; h++)
        encode(c, at(c.q, c.q_step, b, h, 0), c.q_step.row, c.n, head, nullptr, c.query_block, c.q_stride, offsets, queries.data(), 1, all);
    encode(c, at(c.k, c.k_step, b, head, 0), c.k_step.row, c.m, head, visible(c, b, head), c.key_block, c.k_stride, offsets, keys.data(),
           padded, 1);
    product<false>(c.tiles, padded, all, queries.data(), all, 1, keys.data(), padded, scores, padded);
}

// to [size, lanes]: means of `count` runs from the first_run-th of head h, times the scale; zeros past them.
static void run_means(const Call& c, i64 b, i64 h, i64 first_run, i64 count, i64 lanes, std::vector<REAL>& wide, REAL* plain, REAL* to) {
    for (i64 i = 0; i < count; i++) {
        const i64 first = (first_run + i) * c.run, stop = std::min(c.n, first + c.run);
        REAL* mean = plain + i * c.d;
        std::fill(mean, mean + c.d, 0);
        const Rows<REAL> queries = whole_rows(at(c.q, c.q_step, b, h, first), c.q_step.row, stop - first, c.d, wide);
        for (i64 row = 0; row < stop - first; row++)
            for (i64 j = 0; j < c.d; j++) mean[j] += queries.first[row * queries.step + j];
        for (i64 j = 0; j < c.d; j++) mean[j] *= (REAL)c.scale / (stop - first);
    }
    transpose(plain, c.d, count, c.d, to, lanes);
}

// Whether one of the tiles may not keep all of its allowed blocks. Others need no scores: at density 1 none, of causal ones the first.
static bool chooses(const Call& c, const uint8_t* allowed, i64 first_tile, i64 last_tile) {
    for (i64 tile = first_tile; tile <= last_tile; tile++) {
        const uint8_t* blocks = allowed + tile * c.blocks;
        if (std::count_if(blocks, blocks + c.blocks, [](uint8_t open) { return open; }) > c.width) return true;
    }
    return false;
}

// scores [tiles, padded]: softmax of run means over the visible keys of allowed blocks, summed over each block and tile, where one chooses.
static void pooled(const Call& c, i64 b, i64 head, const uint8_t* allowed, REAL* scores, i64 padded) {
    const i64 group = c.heads / c.key_heads, runs = (c.n + c.run - 1) / c.run, runs_per_tile = c.query_block / c.run;
    const uint8_t* shown = visible(c, b, head);
    std::vector<REAL> all_keys, wide, plain(CHUNK * c.d), means(c.d * CHUNK), logits(c.key_block * CHUNK), largest(c.blocks * CHUNK), sums(c.blocks * CHUNK);
    const Rows<REAL> known = whole_rows(at(c.k, c.k_step, b, head, 0), c.k_step.row, c.m, c.d, all_keys);
    std::fill(scores, scores + c.tiles * padded, 0);
    for (i64 h = head * group; h < (head + 1) * group; h++)
        for (i64 first = 0; first < runs; first += CHUNK) {
            const i64 count = std::min(CHUNK, runs - first), lanes = up_to(count, LANES);
            const i64 first_tile = first / runs_per_tile, last_tile = (first + count - 1) / runs_per_tile;
            if (!chooses(c, allowed, first_tile, last_tile)) continue;
            run_means(c, b, h, first, count, lanes, wide, plain.data(), means.data());
            for (i64 block = 0; block < c.blocks; block++) {
                REAL *most = largest.data() + block * lanes, *sum = sums.data() + block * lanes;
                std::fill(most, most + lanes, -INF);
                std::fill(sum, sum + lanes, 0);
                bool open = false;
                for (i64 tile = first_tile; tile <= last_tile; tile++) open |= allowed[tile * c.blocks + block];
                if (!open) continue;
                const i64 key = block * c.key_block, keys = std::min(c.key_block, c.m - key);
                product<false>(keys, lanes, c.d, known.first + key * known.step, known.step, 1, means.data(), lanes, logits.data(), lanes);
                for (i64 j = 0; j < lanes; j += LANES) {
                    Vector high = spread(-INF), total = Vector{};
                    for (i64 i = 0; i < keys; i++)
                        if (!shown || shown[key + i]) high = greater(load(logits.data() + i * lanes + j), high);
                    for (i64 i = 0; i < keys; i++)
                        if (!shown || shown[key + i]) total += exponential(load(logits.data() + i * lanes + j) - high);
                    store(most + j, high);
                    store(sum + j, total);
                }
                for (i64 i = 0; i < count; i++)
                    if (!allowed[(first + i) / runs_per_tile * c.blocks + block]) most[i] = -INF, sum[i] = 0;
            }
            for (i64 j = 0; j < lanes; j += LANES) {
                Vector most = spread(-INF), total = Vector{};
                for (i64 block = 0; block < c.blocks; block++) most = greater(load(largest.data() + block * lanes + j), most);
                for (i64 block = 0; block < c.blocks; block++) {
                    const Vector weight =
                        load(sums.data() + block * lanes + j) * exponential(load(largest.data() + block * lanes + j) - most);
                    store(sums.data() + block * lanes + j, weight);
                    total += weight;
                }
                for (i64 i = j; i < std::min(count, j + LANES); i++) {
                    // A run whose scores are not finite has no say; its tile has other runs.
                    const REAL share = 1 / total[i - j];
                    if (!(std::isfinite(total[i - j]) && std::isfinite(share))) continue;
                    REAL* into = scores + (first + i) / runs_per_tile * padded;
                    for (i64 block = 0; block < c.blocks; block++) into[block] += sums[block * lanes + i] * share;
                }
            }
        }
}

struct Candidate {
    REAL score;
    i64 distance, block;
    bool operator<(const Candidate& other) const {  // better
        if (score != other.score) return score > other.score;
        return distance != other.distance ? distance < other.distance : block < other.block;
    }
};

// The best `width` allowed blocks of each tile: its own first, the nearest of equals; in ascending order.
static void choose(const Call& c, i64 b, i64 head, const uint8_t* allowed, const REAL* scores, i64 padded) {
    std::vector<Candidate> found;
    for (i64 tile = 0; tile < c.tiles; tile++) {
        const i64 list = (b * c.key_heads + head) * c.tiles + tile, first = tile * c.query_block + c.m - c.n;
        const i64 last = std::min((tile + 1) * c.query_block, c.n) - 1 + c.m - c.n;
        found.clear();
        for (i64 block = 0; block < c.blocks; block++) {
            if (!allowed[tile * c.blocks + block]) continue;
            const i64 start = block * c.key_block;
            const bool own = c.own && last >= start && first < start + c.key_block;
            // Twice the distance of the centres keeps half positions integral.
            const i64 distance = std::abs(2 * (first - start) + c.query_block - c.key_block);
            found.push_back({own ? INF : scores[tile * padded + block], distance, block});
        }
        const i64 count = std::min<i64>(c.width, found.size());
        if (count < (i64)found.size()) std::nth_element(found.begin(), found.begin() + count, found.end());
        int32_t* ids = c.ids + list * c.width;
        for (i64 i = 0; i < c.width; i++) ids[i] = i < count ? (int32_t)found[i].block : 0;
        std::sort(ids, ids + count);
        c.lengths[list] = (int32_t)count;
    }
}

// Chooses for pairs [start, stop) of key head and batch row, numbered head * batch + b. Statistics want all pairs of a head in one call.
extern "C" void select_blocks(const Call* call, i64 start, i64 stop) {
    const Call& c = *call;
    const i64 padded = up_to(c.blocks, LANES);
    std::vector<REAL> scores(c.tiles * padded);
    for (i64 pair = start; pair < stop; pair++) {
        const i64 head = pair / c.batch, b = pair % c.batch;
        const uint8_t* allowed = c.allowed + b * c.allowed_b + head * c.allowed_h;
        if (c.words)
            agreements(c, b, head, scores.data(), padded);
        else
            pooled(c, b, head, allowed, scores.data(), padded);
        choose(c, b, head, allowed, scores.data(), padded);
    }
}
