/* Blocks of `height` x 128: s = max(max |x| / 448, 2^-126), or the smallest power of two that is no less; q = e4m3(x / s). A
 * block that is not finite is NaN throughout. */
#include "samebit.h"

enum { SIDE = 128, E4M3_NAN = 0x7f };

/* The nearest e4m3 of a finite v, ties to even, at most 448. */
static inline uint8_t e4m3_of(float v) {
    uint8_t sign = (uint8_t)((uint32_t)bits_of(v) >> 24 & 0x80);
    float a = fminf(fabsf(v), 448.0f);
    if (a < 0x1p-6f) return sign | (uint8_t)nearest(a * 0x1p9f); /* subnormals are whole numbers of 2^-9; 8 of them are 2^-6 */
    int32_t b = bits_of(a);
    b += 0x7ffff + (b >> 20 & 1);
    return sign | (uint8_t)((b >> 20) - (120 << 3));
}

/* x [rows * height, columns * 128] -> q of the same shape, s [rows, columns]. */
void quantize(const float *x, uint8_t *q, float *s, int64_t rows, int64_t columns, int64_t height, int64_t power_of_two,
              int64_t threads) {
    int64_t K = columns * SIDE;
    PARALLEL_FOR
    for (int64_t block = 0; block < rows * columns; block++) {
        int64_t first = block / columns * height * K + block % columns * SIDE;
        int32_t most = 0; /* bits of |x| ascend as |x| does, and are above those of infinity for NaN */
        for (int64_t r = 0; r < height; r++)
            for (int64_t k = 0; k < SIDE; k++) {
                int32_t b = bits_of(x[first + r * K + k]) & 0x7fffffff;
                most = b > most ? b : most;
            }
        int finite = most < 0x7f800000;
        float scale = fmaxf(float_of(most) / 448.0f, 0x1p-126f);
        if (power_of_two) scale = float_of((bits_of(scale) + 0x7fffff) & 0x7f800000);
        s[block] = finite ? scale : float_of(0x7fc00000);
        for (int64_t r = 0; r < height; r++)
            for (int64_t k = 0; k < SIDE; k++) {
                int64_t at = first + r * K + k;
                q[at] = finite ? e4m3_of(x[at] / scale) : E4M3_NAN;
            }
    }
}
