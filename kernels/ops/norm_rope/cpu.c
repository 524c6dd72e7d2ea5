/* Rotary position embedding: the pair (x[i], x[i + D/2]) turns by the angle of its position; `sign` -1 turns back. */
#include "wide.h"

/* angle, cosine, sine [n]. */
void cos_sin_table(const double *angle, float *cosine, float *sine, int64_t n, int64_t threads) {
    PARALLEL_FOR
    for (int64_t start = 0; start < n; start += 1024) {
        int64_t stop = start + 1024 < n ? start + 1024 : n;
        SIMD for (int64_t i = start; i < stop; i++) cos_sin(angle[i], cosine + i, sine + i);
    }
}

/* x, y [tokens, heads, D]; cosine, sine [positions, D / 2]; position [tokens]. */
void rope(const float *x, const float *cosine, const float *sine, const int32_t *position, float *y, int64_t tokens,
          int64_t heads, int64_t D, float sign, int64_t threads) {
    PARALLEL_FOR
    for (int64_t row = 0; row < tokens * heads; row++) {
        const float *c = cosine + position[row / heads] * (D / 2), *s = sine + position[row / heads] * (D / 2);
        const float *a = x + row * D, *b = a + D / 2;
        float *u = y + row * D, *v = u + D / 2;
        SIMD for (int64_t i = 0; i < D / 2; i++) {
            float turn = s[i] * sign;
            u[i] = fmaf(a[i], c[i], -(b[i] * turn));
            v[i] = fmaf(b[i], c[i], a[i] * turn);
        }
    }
}
