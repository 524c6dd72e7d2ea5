/* Causal attention of packed queries over paged keys, and its gradient.
 *
 * Row order. A row is a query and a head. Keys are walked from position 0 in splits of `key_split`, a split in blocks of
 * `key_block`. Inside a split the softmax is online: scores s = (q . k) * scale in row order (row_dot), m the running
 * maximum, p = 2^(s - m), l = l * 2^(m_old - m) + (p folded by halves over the block), o = o * 2^(m_old - m), then one fma
 * chain over the keys of the block. Splits merge in ascending order. Out: o / l, and lse = m + log2 l (natural logarithm
 * of l over ln 2).
 *
 * Rows of one sequence and kv head are computed together, as a tile, which shares what it reads of keys and values. Every
 * row keeps its own order, so that none depends on its neighbours, on the page layout or on what else is in the batch.
 * head_dim is a multiple of 16.
 */
#include "samebit.h"
#define PARALLEL_TILES _Pragma("omp parallel for schedule(dynamic) num_threads((int)threads) if (threads > 1)")
enum { MAX_KEYS = 128, KEYS = 16, ROWS = 64, STRIP = 8, FEW = 4 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* KEYS rows as columns, t[i][j] = rows[j][i]; zeros where there are fewer. */
static void columns(float *t, const float *const *rows, int64_t count, int64_t D) {
    for (int j = 0; j < KEYS; j += WIDTH) to_columns(t + j, KEYS, rows + j, count - j, D);
}

/* v[i] is lane i of WIDTH sums in row order: the sums. */
INLINE lanes folded(lanes *v) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) v[i] = lanes_add(v[i], v[i + 8]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) v[i] = lanes_add(v[i], v[i + 4]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) v[i] = lanes_add(v[i], v[i + 2]);
    return lanes_add(v[0], v[1]);
}

/* out[j] = row_dot(a, column j of t), WIDTH columns at once. */
static void dots(float *out, const float *a, const float *t, int64_t D) {
    for (int from = 0; from < KEYS; from += WIDTH) {
        lanes v[ROW_LANES];
#pragma GCC unroll 16
        for (int i = 0; i < ROW_LANES; i++) v[i] = lanes_fill(0.0f);
        for (int64_t first = 0; first < D; first += ROW_LANES)
#pragma GCC unroll 16
            for (int i = 0; i < ROW_LANES; i++)
                v[i] = lanes_fma(lanes_fill(a[first + i]), lanes_load(t + (first + i) * KEYS + from), v[i]);
        lanes_store(out + from, folded(v));
    }
}

/* out[j] = row_dot(a, rows[j]) for `count` of KEYS rows, without their columns. */
static void few_dots(float *out, const float *a, const float *const *rows, int64_t count, int64_t D) {
    for (int from = 0; from < count; from += WIDTH) {
        lanes v[ROW_LANES];
#pragma GCC unroll 16
        for (int i = 0; i < ROW_LANES; i++) v[i] = lanes_fill(0.0f);
        for (int64_t first = 0; first < D; first += ROW_LANES)
#pragma GCC unroll 16
            for (int i = 0; i < ROW_LANES; i++) { /* part i / WIDTH of row i % WIDTH */
                const float *row = rows[from + i % WIDTH < count ? from + i % WIDTH : 0] + first + i / WIDTH * WIDTH;
                v[i] = lanes_fma(lanes_load(a + first + i / WIDTH * WIDTH), lanes_load(row), v[i]);
            }
#pragma GCC unroll 2
        for (int i = 0; i < ROW_LANES; i += WIDTH) lanes_transpose(v + i);
        lanes_store(out + from, folded(v));
    }
}

typedef struct { int64_t from, to; } range;

/* `n` sums and c * WIDTH columns of `add_products`, with one range. */
INLINE void strip(float *sum, int64_t sum_step, const int n, const int c, const float *x, int64_t x_step, const float *w,
                  int64_t w_sum, int64_t w_step, range at) {
    lanes v[STRIP], y[STRIP];
#pragma GCC unroll 8
    for (int t = 0; t < n * c; t++) v[t] = lanes_load(sum + t / c * sum_step + t % c * WIDTH);
    for (int64_t i = at.from; i < at.to; i++) {
#pragma GCC unroll 8
        for (int k = 0; k < c; k++) y[k] = lanes_load(x + i * x_step + k * WIDTH);
#pragma GCC unroll 8
        for (int t = 0; t < n * c; t++) v[t] = lanes_fma(lanes_fill(w[t / c * w_sum + i * w_step]), y[t % c], v[t]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < n * c; t++) lanes_store(sum + t / c * sum_step + t % c * WIDTH, v[t]);
}

/* `n` sums of `add_products`, with one range: the fewer they are, the more columns go on together. */
INLINE void strips(float *sum, int64_t sum_step, const int n, const float *x, int64_t x_step, const float *w, int64_t w_sum,
                   int64_t w_step, range at, int64_t D) {
    int64_t d = 0;
#define STRIPS(c)                                \
    for (; d + (c) * WIDTH <= D; d += (c) * WIDTH) \
    strip(sum + d, sum_step, n, c, x + d, x_step, w, w_sum, w_step, at)
    if (n <= 1) STRIPS(8);
    if (n <= 2) STRIPS(4);
    if (n <= 4) STRIPS(2);
    STRIPS(1);
#undef STRIPS
}

static void alone(float *sum, const float *x, int64_t x_step, const float *w, int64_t w_step, range at, int64_t D) {
    strips(sum, 0, 1, x, x_step, w, 0, w_step, at, D);
}

/* sum[s][d] = one fma chain over its range of i, ascending, of w[s][i] x[i][d]. Sums go on together where their ranges do. */
static void add_products(float *sum, int64_t sum_step, int64_t sums, const float *x, int64_t x_step, const float *w,
                         int64_t w_sum, int64_t w_step, const range *at, int64_t D) {
    for (int64_t s = 0, n; s < sums; s += n, sum += n * sum_step, w += n * w_sum, at += n) {
        range all = at[0]; /* what they have in common */
        for (n = STRIP; n > sums - s; n /= 2) {}
        for (int64_t i = 1; i < n; i++) all.from = most(all.from, at[i].from), all.to = least(all.to, at[i].to);
        if (all.from >= all.to) all.from = all.to = INT64_MAX;
        for (int64_t i = 0; i < n; i++) {
            range first = {at[i].from, least(at[i].to, all.from)};
            if (first.from < first.to) alone(sum + i * sum_step, x, x_step, w + i * w_sum, w_step, first, D);
        }
        if (all.from == INT64_MAX) continue;
        if (n == 8) strips(sum, sum_step, 8, x, x_step, w, w_sum, w_step, all, D);
        else if (n == 4) strips(sum, sum_step, 4, x, x_step, w, w_sum, w_step, all, D);
        else if (n == 2) strips(sum, sum_step, 2, x, x_step, w, w_sum, w_step, all, D);
        else alone(sum, x, x_step, w, w_step, all, D);
        for (int64_t i = 0; i < n; i++)
            if (all.to < at[i].to)
                alone(sum + i * sum_step, x, x_step, w + i * w_sum, w_step, (range){all.to, at[i].to}, D);
    }
}

typedef struct {
    const int32_t *table;  /* [sequences, table_width] page numbers */
    const int32_t *sequence, *position; /* of each query token */
    int64_t table_width, page_size, heads, kv_heads, head_dim, key_block, key_split;
    float scale; /* softmax scale * log2 e */
} layout;

/* key[j]: the key of kv head `kv` at position first + j. A page is looked up once. */
static void find_keys(const layout *at, const float **key, const float *keys, int64_t sequence, int64_t kv, int64_t first,
                      int64_t count) {
    const int64_t stride = at->kv_heads * at->head_dim;
    for (int64_t j = 0; j < count;) {
        const int64_t page = (first + j) / at->page_size, within = first + j - page * at->page_size;
        const int64_t row = at->table[sequence * at->table_width + page] * at->page_size + within;
        const int64_t end = least(count, j + at->page_size - within);
        const float *k = keys + row * stride + kv * at->head_dim;
        for (; j < end; j++, k += stride) key[j] = k;
    }
}

/* Scores of `count` keys for each row that sees so many; p[r][j], KEYS of them. Few rows are not worth the columns. */
static void scores(float *p, const float *const *q, const int64_t *seen, int64_t rows, const float *const *key,
                   int64_t count, int64_t D) {
    float t[D * KEYS];
    if (rows > FEW) columns(t, key, count, D);
    for (int64_t r = 0; r < rows; r++) {
        if (seen[r] <= 0) continue;
        if (rows > FEW) dots(p + r * MAX_KEYS, q[r], t, D);
        else few_dots(p + r * MAX_KEYS, q[r], key, count, D);
    }
}

/* p: scores to 2^(s - m), zeros from `count` on; o *= shrink. */
static void soften(const layout *at, float *p, int64_t count, float *m, float *l, float *o) {
    float top = *m, folded[MAX_KEYS];
    for (int64_t j = 0; j < count; j++) {
        p[j] = p[j] * at->scale;
        top = p[j] > top ? p[j] : top;
    }
    SIMD for (int64_t j = 0; j < count; j++) p[j] = exp2_f32(p[j] - top);
    for (int64_t j = count; j < at->key_block; j++) p[j] = 0.0f;
    float shrink = exp2_f32(*m - top);
    SIMD for (int64_t d = 0; d < at->head_dim; d++) o[d] = o[d] * shrink;
    memcpy(folded, p, sizeof(float) * (size_t)at->key_block);
    *l = fmaf(*l, shrink, fold_lanes(folded, (int)at->key_block));
    *m = top;
}

/* Of what will be read soon. Other heads lie between the keys of one, so the hardware does not foresee it. */
static inline void fetch(const float *x, int64_t D) {
    for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(x + d);
}

/* A tile: the rows of `tokens` tokens of a sequence and of `heads` heads that share a kv head, at most ROWS. */
static void attend(const layout *at, int64_t token, int64_t tokens, int64_t head, int64_t heads, const float *q,
                   const float *keys, const float *values, float *out, float *lse) {
    const int64_t D = at->head_dim, stride = at->kv_heads * D, rows = tokens * heads, sequence = at->sequence[token];
    const int64_t kv = head / (at->heads / at->kv_heads);
    const float *query[ROWS];
    float m[ROWS], l[ROWS], M[ROWS], L[ROWS], o[ROWS * D], O[ROWS * D], p[ROWS * MAX_KEYS], v[KEYS * D];
    int64_t n[ROWS], last = 0; /* keys that a row sees, and the most */
    for (int64_t r = 0; r < rows; r++) {
        query[r] = q + ((token + r / heads) * at->heads + head + r % heads) * D;
        n[r] = at->position[token + r / heads] + 1;
        last = most(last, n[r]);
        M[r] = -INFINITY, L[r] = 0.0f;
    }
    memset(O, 0, sizeof(float) * (size_t)(rows * D));
    for (int64_t split = 0; split < last; split += at->key_split) {
        const int64_t split_end = least(split + at->key_split, last);
        for (int64_t r = 0; r < rows; r++) m[r] = -INFINITY, l[r] = 0.0f;
        memset(o, 0, sizeof(float) * (size_t)(rows * D));
        for (int64_t first = split; first < split_end; first += at->key_block) {
            const int64_t width = least(at->key_block, split_end - first);
            const float *key[MAX_KEYS];
            int64_t seen[ROWS];
            find_keys(at, key, keys, sequence, kv, first, width);
            for (int64_t j = 0; j < width; j += KEYS) {
                const int64_t end = least(j + KEYS, width);
                for (int64_t i = j; rows <= FEW && i < end; i++) {
                    fetch(values + (key[i] - keys), D);
                    if (i + KEYS < width) fetch(key[i + KEYS], D);
                }
                for (int64_t r = 0; r < rows; r++) seen[r] = n[r] - first - j;
                scores(p + j, query, seen, rows, key + j, end - j, D);
            }
            for (int64_t r = 0; r < rows; r++) {
                seen[r] = most(0, least(width, n[r] - first));
                if (seen[r]) soften(at, p + r * MAX_KEYS, seen[r], m + r, l + r, o + r * D);
            }
            for (int64_t j = 0; j < width; j += KEYS) {
                range visible[ROWS];
                const int64_t end = least(j + KEYS, width);
                int copy = rows > FEW; /* many rows read them often, and from a large stride they would evict each other */
                for (int64_t i = j + 1; i < end; i++) copy |= key[i] - key[i - 1] != stride;
                for (int64_t i = j; copy && i < end; i++)
                    memcpy(v + (i - j) * D, values + (key[i] - keys), sizeof(float) * (size_t)D);
                for (int64_t r = 0; r < rows; r++) visible[r] = (range){0, least(KEYS, seen[r] - j)};
                const float *x = copy ? v : values + (key[j] - keys);
                add_products(o, D, rows, x, copy ? D : stride, p + j, MAX_KEYS, 1, visible, D);
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            if (n[r] <= split) continue;
            float top = m[r] > M[r] ? m[r] : M[r], a = exp2_f32(M[r] - top), b = exp2_f32(m[r] - top);
            for (int64_t d = 0; d < D; d++) O[r * D + d] = fmaf(O[r * D + d], a, o[r * D + d] * b);
            L[r] = fmaf(L[r], a, l[r] * b);
            M[r] = top;
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        float *y = out + (query[r] - q);
        for (int64_t d = 0; d < D; d++) y[d] = O[r * D + d] / L[r];
        lse[(query[r] - q) / D] = fmaf(log_f32(L[r]), 0x1.715476p0f, M[r]);
    }
}

/* q, out [tokens, heads, head_dim]; keys, values [pages * page_size, kv_heads, head_dim]; lse [tokens, heads]. */
void attention(const float *q, const float *keys, const float *values, const int32_t *table, const int32_t *sequence,
               const int32_t *position, float *out, float *lse, int64_t tokens, int64_t table_width, int64_t page_size,
               int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t key_block, int64_t key_split, float scale,
               int64_t threads) {
    layout at = {table, sequence, position, table_width, page_size, heads, kv_heads, head_dim, key_block, key_split, scale};
    const int64_t group = heads / kv_heads, most_heads = least(group, ROWS), parts = (group + most_heads - 1) / most_heads;
    int64_t longest = 1; /* run of tokens of one sequence */
    for (int64_t t = 1, run = 1; t < tokens; t++) longest = most(longest, run = sequence[t] == sequence[t - 1] ? run + 1 : 1);
    const int64_t work = most(1, tokens * kv_heads / (4 * threads)); /* for every thread */
    const int64_t piece = least(least(ROWS / most_heads, longest), work), pieces = (tokens + piece - 1) / piece;
    PARALLEL_TILES /* heads of a token one after the other, as their keys lie side by side */
    for (int64_t task = 0; task < pieces * kv_heads * parts; task++) {
        const int64_t share = task % (kv_heads * parts), head = share / parts * group + share % parts * most_heads;
        const int64_t count = least(most_heads, (share / parts + 1) * group - head);
        const int64_t begin = task / (kv_heads * parts) * piece, end = least(begin + piece, tokens);
        for (int64_t t = begin, same; t < end; t += same) {
            for (same = 1; t + same < end && sequence[t + same] == sequence[t];) same++;
            attend(&at, t, same, head, count, q, keys, values, out, lse);
        }
    }
}

/* Gradient. Of a sequence and a kv head, rows ascend, queries first and the heads of the group within a query, so a
 * sequence cannot see its neighbours. With p = 2^(s - lse) and delta = out . d_out (row order):
 *     d_s = p (d_out . v - delta);  d_q += scale d_s k;  d_k += scale d_s q;  d_v += p d_out
 * each one chain of fma: d_q over keys, d_k and d_v over rows. Keys and values are the activations of the same tokens:
 * sequence i is rows starts[i] .. starts[i + 1]. */
void attention_backward(const float *q, const float *keys, const float *values, const float *out, const float *lse,
                        const float *d_out, const int64_t *starts, float *d_q, float *d_k, float *d_v, int64_t sequences,
                        int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, float scale_log2, int64_t threads) {
    const int64_t D = head_dim, group = heads / kv_heads, stride = kv_heads * D;
    PARALLEL_TILES
    for (int64_t task = 0; task < sequences * kv_heads; task++) {
        const int64_t begin = starts[task / kv_heads], tokens = starts[task / kv_heads + 1] - begin, kv = task % kv_heads;
        const int64_t base = (begin * kv_heads + kv) * D;
        float qs[ROWS * D], go[ROWS * D], gq[ROWS * D], delta[ROWS], e[ROWS], kt[D * KEYS], vt[D * KEYS];
        float p[ROWS * KEYS], ds[ROWS * KEYS];
        range at[ROWS];
        int64_t row[ROWS]; /* of q, and of all that is shaped like it */
        for (int64_t t = 0; t < tokens; t++) {
            memset(d_k + base + t * stride, 0, sizeof(float) * (size_t)D);
            memset(d_v + base + t * stride, 0, sizeof(float) * (size_t)D);
        }
        for (int64_t first = 0; first < tokens * group; first += ROWS) {
            const int64_t rows = least(ROWS, tokens * group - first);
            for (int64_t r = 0; r < rows; r++) {
                row[r] = (begin + (first + r) / group) * heads + kv * group + (first + r) % group;
                memcpy(qs + r * D, q + row[r] * D, sizeof(float) * (size_t)D);
                memcpy(go + r * D, d_out + row[r] * D, sizeof(float) * (size_t)D);
                delta[r] = row_dot(out + row[r] * D, go + r * D, D), e[r] = lse[row[r]];
            }
            memset(gq, 0, sizeof(float) * (size_t)(rows * D));
            for (int64_t j0 = 0; j0 <= (first + rows - 1) / group; j0 += KEYS) {
                const int64_t count = least(KEYS, tokens - j0), from = base + j0 * stride;
                const int64_t top = most(0, j0 * group - first); /* the first row that sees the first key */
                const float *k[KEYS], *v[KEYS];
                for (int64_t j = 0; j < count; j++) k[j] = keys + from + j * stride, v[j] = values + from + j * stride;
                columns(kt, k, count, D), columns(vt, v, count, D);
                for (int64_t r = top; r < rows; r++) {
                    float *pr = p + r * KEYS, *dr = ds + r * KEYS;
                    dots(pr, qs + r * D, kt, D), dots(dr, go + r * D, vt, D);
                    SIMD for (int j = 0; j < KEYS; j++) {
                        pr[j] = exp2_f32(pr[j] * scale_log2 - e[r]);
                        dr[j] = pr[j] * (dr[j] - delta[r]) * scale;
                    }
                }
                for (int64_t r = top; r < rows; r++) at[r] = (range){0, least(count, (first + r) / group - j0 + 1)};
                add_products(gq + top * D, D, rows - top, keys + from, stride, ds + top * KEYS, KEYS, 1, at + top, D);
                for (int64_t j = 0; j < count; j++) at[j] = (range){least(rows, most(0, (j0 + j) * group - first)), rows};
                add_products(d_k + from, stride, count, qs, D, ds, 1, KEYS, at, D);
                add_products(d_v + from, stride, count, go, D, p, 1, KEYS, at, D);
            }
            for (int64_t r = 0; r < rows; r++) memcpy(d_q + row[r] * D, gq + r * D, sizeof(float) * (size_t)D);
        }
    }
}
