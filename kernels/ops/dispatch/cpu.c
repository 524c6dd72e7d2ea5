/* Rows sorted by expert. */
#include "samebit.h"

/* Choices in ascending token, each at the next row of its expert; `next` [experts] begins at the starts. */
void place(const int32_t *ids, int32_t *of, int32_t *token, int64_t *next, int64_t tokens, int64_t k, int64_t first, int64_t experts,
           int64_t threads) {
    (void)threads; /* a running count */
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < k; i++) {
            int64_t e = ids[t * k + i] - first;
            of[t * k + i] = -1;
            if (e < 0 || e >= experts) continue;
            of[t * k + i] = (int32_t)next[e];
            token[next[e]++] = (int32_t)t;
        }
}

/* d_x[t] = sum over the rows of token t, from zero, in the order of its choices. */
void gather_backward(const float *d_rows, const int32_t *of, float *d_x, int64_t tokens, int64_t k, int64_t n, int64_t threads) {
    PARALLEL_FOR
    for (int64_t t = 0; t < tokens; t++) {
        float *out = d_x + t * n;
        for (int64_t j = 0; j < n; j++) out[j] = 0.0f;
        for (int64_t i = 0; i < k; i++) {
            const int64_t row = of[t * k + i];
            if (row < 0) continue;
            SIMD for (int64_t j = 0; j < n; j++) out[j] = out[j] + d_rows[row * n + j];
        }
    }
}
