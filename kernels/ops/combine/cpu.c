/* The weighted sum of a token's experts on the tree of experts. */
#include "samebit.h"

/* The root of leaves first_leaf .. + count - 1 into `out` [n]; `room` [levels, n]. */
static void node(const float *y, const float *weights, const int32_t *of, const int32_t *ids, float *out, float *room, int64_t k,
                 int64_t n, int64_t first, int64_t extent, int64_t first_leaf, int64_t count) {
    if (count > 1) {
        node(y, weights, of, ids, out, room + n, k, n, first, extent, first_leaf, count / 2);
        node(y, weights, of, ids, room, room + n, k, n, first, extent, first_leaf + count / 2, count / 2);
        SIMD for (int64_t j = 0; j < n; j++) out[j] = out[j] + room[j];
        return;
    }
    for (int64_t j = 0; j < n; j++) out[j] = 0.0f;
    for (int64_t i = 0; i < k; i++) {
        if (of[i] < 0 || (ids[i] - first) / extent != first_leaf) continue;
        const float w = weights[i], *row = y + of[i] * n;
        SIMD for (int64_t j = 0; j < n; j++) out[j] = fmaf(w, row[j], out[j]);
    }
}

void combine(const float *y, const float *weights, const int32_t *of, const int32_t *ids, float *out, float *room, int64_t tokens,
             int64_t k, int64_t n, int64_t first, int64_t extent, int64_t leaves, int64_t levels, int64_t threads) {
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; t++)
        node(y, weights + t * k, of + t * k, ids + t * k, out + t * n, room + t * levels * n, k, n, first, extent, 0, leaves);
}

void combine_backward(const float *d_out, const float *y, const float *weights, const int32_t *of, float *d_y, float *d_weights,
                      int64_t tokens, int64_t k, int64_t n, int64_t threads) {
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < k; i++) {
            const int64_t row = of[t * k + i];
            d_weights[t * k + i] = 0.0f;
            if (row < 0) continue;
            const float w = weights[t * k + i], *g = d_out + t * n;
            d_weights[t * k + i] = row_dot(y + row * n, g, n);
            SIMD for (int64_t j = 0; j < n; j++) d_y[row * n + j] = w * g[j];
        }
}
