/* y = silu(gate) * up, silu(g) = g / (1 + e^-g); a row of x is gate then up, n each. */
#include "samebit.h"

void swiglu(const float *x, float *y, int64_t rows, int64_t n, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = x + 2 * r * n, *up = gate + n;
        float *out = y + r * n;
        SIMD for (int64_t i = 0; i < n; i++) out[i] = gate[i] / (1.0f + exp_f32(-gate[i])) * up[i];
    }
}

/* d_up = d_y silu(gate); d_gate = d_y up sigma (1 + gate (1 - sigma)). */
void swiglu_backward(const float *x, const float *d_y, float *d_x, int64_t rows, int64_t n, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = x + 2 * r * n, *up = gate + n, *g = d_y + r * n;
        float *d_gate = d_x + 2 * r * n, *d_up = d_gate + n;
        SIMD for (int64_t i = 0; i < n; i++) {
            float sigma = 1.0f / (1.0f + exp_f32(-gate[i]));
            d_up[i] = g[i] * (gate[i] * sigma);
            d_gate[i] = g[i] * up[i] * sigma * fmaf(gate[i], 1.0f - sigma, 1.0f);
        }
    }
}
