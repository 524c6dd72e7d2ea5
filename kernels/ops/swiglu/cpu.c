/* y = silu(gate) * up, silu(g) = g / (1 + e^-g); a row of x is gate and up in turns of `stripe` columns, n each in all. */
#include "samebit.h"

void swiglu(const float *x, float *y, int64_t rows, int64_t n, int64_t stripe, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++)
        for (int64_t s = 0; s < n; s += stripe) {
            const float *gate = x + 2 * (r * n + s), *up = gate + stripe;
            float *out = y + r * n + s;
            SIMD for (int64_t i = 0; i < stripe; i++) out[i] = gate[i] / (1.0f + exp_f32(-gate[i])) * up[i];
        }
}

/* d_up = d_y silu(gate); d_gate = d_y up sigma (1 + gate (1 - sigma)). */
void swiglu_backward(const float *x, const float *d_y, float *d_x, int64_t rows, int64_t n, int64_t stripe, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++)
        for (int64_t s = 0; s < n; s += stripe) {
            const float *gate = x + 2 * (r * n + s), *up = gate + stripe, *g = d_y + r * n + s;
            float *d_gate = d_x + 2 * (r * n + s), *d_up = d_gate + stripe;
            SIMD for (int64_t i = 0; i < stripe; i++) {
                float sigma = 1.0f / (1.0f + exp_f32(-gate[i]));
                d_up[i] = g[i] * (gate[i] * sigma);
                d_gate[i] = g[i] * up[i] * sigma * fmaf(gate[i], 1.0f - sigma, 1.0f);
            }
        }
}
