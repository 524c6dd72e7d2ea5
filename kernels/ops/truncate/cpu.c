/* Probabilities as integers: floor(2^40 e^(z - max z)), z = logits / temperature; 0 where a logit is no number. */
#include "samebit.h"

/* logits, weight [rows, n]. */
void truncation_weights(const float *logits, const float *temperature, int64_t *weight, int64_t rows, int64_t n,
                        int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * n, t = temperature[r];
        float m = -INFINITY;
        for (int64_t i = 0; i < n; i++) {
            float z = x[i] / t;
            m = z > m ? z : m;
        }
        for (int64_t i = 0; i < n; i++) {
            float e = exp_f32(x[i] / t - m) * 0x1p40f;
            weight[r * n + i] = e == e ? (int64_t)e : 0;
        }
    }
}
