/* Causal attention of packed queries over paged keys: one row (token, head) at a time, so that no row can depend on its
 * neighbours, on the page layout or on what else is in the batch.
 *
 * Row order. Keys are walked from position 0 in splits of `key_split`, a split in blocks of `key_block`. Inside a split
 * the softmax is online: scores s = (q . k) * scale in row order (row_dot), m the running maximum,
 * p = 2^(s - m), l = l * 2^(m_old - m) + (p folded by halves over the block), o = o * 2^(m_old - m), then one fma chain
 * over the keys of the block. Splits merge in ascending order. Out: o / l, and lse = m + log2 l (natural logarithm of
 * l over ln 2).
 */
#include "samebit.h"
enum { MAX_BLOCK = 128, MAX_HEAD_DIM = 512 };

typedef struct {
    const int32_t *table;  /* [sequences, table_width] page numbers */
    const int32_t *sequence, *position; /* of each query token */
    int64_t table_width, page_size, heads, kv_heads, head_dim, key_block, key_split;
    float scale; /* softmax scale * log2 e */
} layout;

static inline int64_t row_of(const layout *at, int64_t sequence, int64_t position) {
    return at->table[sequence * at->table_width + position / at->page_size] * at->page_size + position % at->page_size;
}

static void attend(const layout *at, int64_t t, int64_t h, const float *q, const float *keys, const float *values,
                   float *out, float *lse) {
    const int64_t D = at->head_dim, stride = at->kv_heads * D, kv = h / (at->heads / at->kv_heads);
    const int64_t n = at->position[t] + 1;
    float M = -INFINITY, L = 0.0f, O[MAX_HEAD_DIM] = {0};
    for (int64_t split = 0; split < n; split += at->key_split) {
        int64_t end = split + at->key_split < n ? split + at->key_split : n;
        float m = -INFINITY, l = 0.0f, o[MAX_HEAD_DIM] = {0};
        for (int64_t first = split; first < end; first += at->key_block) {
            int64_t count = first + at->key_block < end ? at->key_block : end - first;
            int64_t row[MAX_BLOCK];
            float p[MAX_BLOCK], top = m;
            for (int64_t j = 0; j < count; j++) {
                row[j] = row_of(at, at->sequence[t], first + j) * stride + kv * D;
                p[j] = row_dot(q, keys + row[j], D) * at->scale;
                top = p[j] > top ? p[j] : top;
            }
            SIMD for (int64_t j = 0; j < count; j++) p[j] = exp2_f32(p[j] - top);
            for (int64_t j = count; j < at->key_block; j++) p[j] = 0.0f;
            float shrink = exp2_f32(m - top);
            for (int64_t d = 0; d < D; d++) o[d] = o[d] * shrink;
            for (int64_t j = 0; j < count; j++) {
                const float *v = values + row[j];
                SIMD for (int64_t d = 0; d < D; d++) o[d] = fmaf(p[j], v[d], o[d]);
            }
            l = fmaf(l, shrink, fold_lanes(p, (int)at->key_block));
            m = top;
        }
        float top = m > M ? m : M, a = exp2_f32(M - top), b = exp2_f32(m - top);
        for (int64_t d = 0; d < D; d++) O[d] = fmaf(O[d], a, o[d] * b);
        L = fmaf(L, a, l * b);
        M = top;
    }
    for (int64_t d = 0; d < D; d++) out[d] = O[d] / L;
    *lse = fmaf(log_f32(L), 0x1.715476p0f, M);
}

/* q, out [tokens, heads, head_dim]; keys, values [pages * page_size, kv_heads, head_dim]; lse [tokens, heads]. */
void attention(const float *q, const float *keys, const float *values, const int32_t *table, const int32_t *sequence,
               const int32_t *position, float *out, float *lse, int64_t tokens, int64_t table_width, int64_t page_size,
               int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t key_block, int64_t key_split, float scale,
               int64_t threads) {
    layout at = {table, sequence, position, table_width, page_size, heads, kv_heads, head_dim, key_block, key_split, scale};
    PARALLEL_FOR
    for (int64_t i = 0; i < tokens * heads; i++)
        attend(&at, i / heads, i % heads, q + i * head_dim, keys, values, out + i * head_dim, lse + i);
}

/* Gradient, one (sequence, kv head) at a time: queries ascend, and the heads of a group ascend within a query, so a
 * sequence cannot see its neighbours. With p = 2^(s - lse) and delta = out . d_out (row order):
 *     d_s = p (d_out . v - delta);  d_q += scale d_s k;  d_k += scale d_s q;  d_v += p d_out
 * Keys and values are the activations of the same tokens: sequence i is rows starts[i] .. starts[i + 1]. */
void attention_backward(const float *q, const float *keys, const float *values, const float *out, const float *lse,
                        const float *d_out, const int64_t *starts, float *d_q, float *d_k, float *d_v, int64_t sequences,
                        int64_t heads, int64_t kv_heads, int64_t head_dim, float scale, float scale_log2, int64_t threads) {
    const int64_t D = head_dim, group = heads / kv_heads;
    PARALLEL_FOR
    for (int64_t task = 0; task < sequences * kv_heads; task++) {
        int64_t s = task / kv_heads, kv = task % kv_heads;
        for (int64_t t = starts[s]; t < starts[s + 1]; t++) {
            memset(d_k + (t * kv_heads + kv) * D, 0, sizeof(float) * (size_t)D);
            memset(d_v + (t * kv_heads + kv) * D, 0, sizeof(float) * (size_t)D);
            for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
                int64_t at = (t * heads + h) * D;
                const float *qt = q + at, *go = d_out + at;
                float *gq = d_q + at, delta = row_dot(out + at, go, D), L = lse[t * heads + h];
                memset(gq, 0, sizeof(float) * (size_t)D);
                for (int64_t j = starts[s]; j <= t; j++) {
                    int64_t key = (j * kv_heads + kv) * D;
                    const float *k = keys + key, *v = values + key;
                    float *gk = d_k + key, *gv = d_v + key;
                    float p = exp2_f32(row_dot(qt, k, D) * scale_log2 - L);
                    float ds = p * (row_dot(go, v, D) - delta) * scale;
                    SIMD for (int64_t d = 0; d < D; d++) {
                        gq[d] = fmaf(ds, k[d], gq[d]);
                        gk[d] = fmaf(ds, qt[d], gk[d]);
                        gv[d] = fmaf(p, go[d], gv[d]);
                    }
                }
            }
        }
    }
}
