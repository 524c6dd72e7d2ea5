/* y = x / sqrt(mean(x^2) + eps) * weight over rows; the sum of squares in row order (row_dot). */
#include "samebit.h"

static inline float inverse_rms(const float *x, int64_t n, float eps) {
    return 1.0f / sqrtf(row_dot(x, x, n) / (float)n + eps);
}

void rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t n, float eps, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *a = x + r * n;
        float *b = y + r * n, inverse = inverse_rms(a, n, eps);
        SIMD for (int64_t i = 0; i < n; i++) b[i] = a[i] * inverse * weight[i];
    }
}

/* d_x = inverse (g - x_hat mean(g x_hat)) with g = d_y weight and x_hat = x inverse; d_weight of each row, d_y x_hat,
 * is written to `d_rows` [rows, n], to be summed by sum_rows. */
void rms_norm_backward(const float *x, const float *weight, const float *d_y, float *d_x, float *d_rows, int64_t rows,
                       int64_t n, float eps, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *a = x + r * n, *g = d_y + r * n;
        float *dx = d_x + r * n, *dw = d_rows + r * n, inverse = inverse_rms(a, n, eps);
        SIMD for (int64_t i = 0; i < n; i++) dw[i] = g[i] * (a[i] * inverse);
        float mean = row_dot(dw, weight, n) / (float)n;
        SIMD for (int64_t i = 0; i < n; i++) dx[i] = inverse * fmaf(-(a[i] * inverse), mean, g[i] * weight[i]);
    }
}
