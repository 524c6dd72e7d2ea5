/* y[m, n] = tree over leaves of (acc = fma(d, sx[m, b] * sw[n / 128, b], acc) over the blocks b of 128 in the leaf, from zero),
 * d = one fma chain over the k of the block, ascending, from zero.
 *
 * The lanes of a vector hold different n, which is whole blocks: a vector has one scale. */
#include "samebit.h"

enum { SIDE = 128, ROWS = 8, GROUP = 32 }; /* rows that are in registers at once; that meet a packed block of w */
enum { SIZE = GROUP * WIDTH };

/* Widens `count` e4m3, which is exact: the exponent is brought to that of float32 by one product. */
static void widen(const uint8_t *from, float *to, int count) {
    SIMD for (int i = 0; i < count; i++) {
        int32_t code = from[i] & 0x7f;
        float magnitude = code == 0x7f ? NAN : float_of(code << 20) * 0x1p120f;
        to[i] = float_of(bits_of(magnitude) | (from[i] & 0x80) << 24);
    }
}

/* d[r][i] = sum of column[k][i] * x[r][k] over a block; acc[r][i] = fma(d, scale of x[r] * scale of w, acc). */
static void add_block(float *acc, const float *column, const float *const *x, const float *const *x_scale, float w_scale) {
    lanes sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = lanes_fill(0.0f);
    for (int k = 0; k < SIDE; k++) {
        lanes c = lanes_load(column + k * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sum[r] = lanes_fma(c, lanes_fill(x[r][k]), sum[r]);
    }
    for (int r = 0; r < ROWS; r++) {
        lanes scale = lanes_fill(*x_scale[r] * w_scale);
        lanes_store(acc + r * WIDTH, lanes_fma(sum[r], scale, lanes_load(acc + r * WIDTH)));
    }
}

/* GROUP rows from m0 on (the last one again where there are fewer) of WIDTH columns from n0 on: out[r][i]. */
static void tile(float *out, const float *x, const float *x_scale, int64_t M, int64_t m0, const uint8_t *w, const float *w_scale,
                 int64_t n0, int64_t K, int64_t leaves) {
    float parked[TREE_LEVELS][SIZE], column[SIDE * WIDTH], wide[WIDTH][SIDE];
    int64_t columns = K / SIDE, in_leaf = columns / leaves;
    for (int64_t leaf = 0; leaf < leaves; leaf++) {
        memset(out, 0, sizeof(float) * SIZE);
        for (int64_t b = leaf * in_leaf; b < (leaf + 1) * in_leaf; b++) {
            const float *rows[WIDTH];
            for (int i = 0; i < WIDTH; i++) widen(w + (n0 + i) * K + b * SIDE, wide[i], SIDE), rows[i] = wide[i];
            to_columns(column, WIDTH, rows, WIDTH, SIDE);
            for (int g = 0; g < GROUP && m0 + g < M; g += ROWS) {
                const float *of_x[ROWS], *of_scale[ROWS];
                for (int r = 0; r < ROWS; r++) {
                    int64_t m = m0 + g + r < M ? m0 + g + r : M - 1;
                    of_x[r] = x + m * K + b * SIDE, of_scale[r] = x_scale + m * columns + b;
                }
                add_block(out + g * WIDTH, column, of_x, of_scale, w_scale[n0 / SIDE * columns + b]);
            }
        }
        int level = 0; /* a binary counter: leaf i closes as many levels as i has trailing one bits */
        for (int64_t n = leaf; n & 1; n >>= 1, level++)
            SIMD for (int i = 0; i < SIZE; i++) out[i] = parked[level][i] + out[i];
        memcpy(parked[level], out, sizeof parked[level]);
    }
}

/* x [M, K] with scales [M, K / 128], w [N, K] with [N / 128, K / 128] -> y [M, N]; leaves a power of two of whole blocks. */
void matmul_fp8(const float *x, const float *x_scale, int64_t M, const uint8_t *w, const float *w_scale, int64_t N, float *y,
                int64_t K, int64_t leaves, int64_t threads) {
    PARALLEL_FOR
    for (int64_t n0 = 0; n0 < N; n0 += WIDTH)
        for (int64_t m0 = 0; m0 < M; m0 += GROUP) {
            float out[SIZE];
            tile(out, x, x_scale, M, m0, w, w_scale, n0, K, leaves);
            for (int64_t r = 0; r < GROUP && m0 + r < M; r++) memcpy(y + (m0 + r) * N + n0, out + r * WIDTH, sizeof(float) * WIDTH);
        }
}
