/* float64 functions for what is made once, on the host, and read by every device: the angles of rope, the initial weights.
 *
 * As in samebit.h: every operation is an IEEE 754 binary64 add, multiply, divide, square root or fused multiply-add, written
 * out one by one, so the bits do not depend on the machine, on its libm or on its vector library.
 */
#pragma once
#include "samebit.h"

static inline double double_of(int64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static inline int64_t bits_of_double(double x) { int64_t b; memcpy(&b, &x, 8); return b; }

#define INTEGER_BITS 0x1.8p52 /* x + this has the nearest integer of x in its low bits */
#define LN2_HIGH 0x1.62e42feep-1 /* 32 bits: small whole multiples are exact */
#define LN2_LOW 0x1.a39ef35793c76p-33

/* e^x for |x| < 700: e^(x - n ln 2) 2^n, Taylor to the 13th power. Within 1 ulp. */
static inline double exp_f64(double x) {
    double n = (x * 0x1.71547652b82fep0 + INTEGER_BITS) - INTEGER_BITS;
    double t = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x)), p = 1.0 / 6227020800.0;
    static const double inverse[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                                     1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                                     0.5,               1.0,              1.0};
    for (int k = 0; k < 13; k++) p = fma(p, t, inverse[k]);
    return p * double_of(((int64_t)n + 1023) << 52);
}

/* Natural logarithm of a normal x > 0, as log_f32: x = 2^e m, ln m = 2 artanh((m - 1) / (m + 1)). Within 2 ulp. */
static inline double log_f64(double x) {
    int64_t b = bits_of_double(x) - 0x3fe6a09e667f3bcd;
    double e = (double)(b >> 52), m = double_of((b & 0x000fffffffffffff) + 0x3fe6a09e667f3bcd);
    double s = (m - 1.0) / (m + 1.0), z = s * s, p = 1.0 / 21.0;
    for (int k = 19; k >= 3; k -= 2) p = fma(z, p, 1.0 / (double)k);
    return fma(e, LN2_HIGH, fma(e, LN2_LOW, fma(2.0 * s, z * p, 2.0 * s)));
}

/* A number as the sum of two float64, of which the second is at most half an ulp of the first: 106 bits. */
typedef struct { double high, low; } pair;

INLINE pair exact_sum(double a, double b) { /* Knuth's; no rounding is lost */
    double s = a + b, t = s - a;
    return (pair){s, (a - (s - t)) + (b - t)};
}
INLINE pair exact_product(double a, double b) { return (pair){a * b, fma(a, b, -(a * b))}; }
INLINE pair normal_pair(double high, double low) { /* Dekker's, where |high| >= |low| */
    double s = high + low;
    return (pair){s, low - (s - high)};
}
INLINE pair pair_add(pair a, pair b) {
    pair s = exact_sum(a.high, b.high);
    return normal_pair(s.high, s.low + (a.low + b.low));
}
INLINE pair pair_multiply(pair a, pair b) {
    pair p = exact_product(a.high, b.high);
    return normal_pair(p.high, p.low + fma(a.high, b.low, a.low * b.high));
}

/* To float32 in one rounding: `high` is first made odd towards `low`, so that it is no tie that `low` would have decided. */
INLINE float pair_to_float(pair v) {
    int64_t b = bits_of_double(v.high), towards = (v.low > 0.0) == (v.high > 0.0) ? 1 : -1;
    return (float)double_of(v.low != 0.0 && !(b & 1) ? b + towards : b);
}

/* z c[0] + z^2 c[1] + ... for |z| <= (pi / 4)^2: the first four coefficients are pairs, the others float64. */
INLINE pair series(pair z, const pair c[4], const double rest[6]) {
    double tail = rest[5];
    _Pragma("GCC unroll 8") for (int i = 4; i >= 0; i--) tail = fma(tail, z.high, rest[i]);
    pair p = {tail, 0.0};
    _Pragma("GCC unroll 8") for (int i = 3; i >= 0; i--) p = pair_add(c[i], pair_multiply(z, p));
    return pair_multiply(z, p);
}
/* 1 / 2!, 1 / 4! ... and 1 / 3!, 1 / 5! ..., which with z = -x^2 are cosine and sine; what is left out is below 2^-77. */
static const pair cosine_pairs[] = {{0.5, 0.0},
                                    {0x1.5555555555555p-5, 0x1.5555555555555p-59},
                                    {0x1.6c16c16c16c17p-10, -0x1.f49f49f49f49fp-65},
                                    {0x1.a01a01a01a01ap-16, 0x1.a01a01a01a01ap-76}};
static const double cosine_rest[] = {1.0 / 3628800.0,        1.0 / 479001600.0,        1.0 / 87178291200.0,
                                     1.0 / 20922789888000.0, 1.0 / 6402373705728000.0, 1.0 / 2432902008176640000.0};
static const pair sine_pairs[] = {{0x1.5555555555555p-3, 0x1.5555555555555p-57},
                                  {0x1.1111111111111p-7, 0x1.1111111111111p-63},
                                  {0x1.a01a01a01a01ap-13, 0x1.a01a01a01a01ap-73},
                                  {0x1.71de3a556c734p-19, -0x1.c154f8ddc6c00p-73}};
static const double sine_rest[] = {1.0 / 39916800.0,        1.0 / 6227020800.0,        1.0 / 1307674368000.0,
                                   1.0 / 355687428096000.0, 1.0 / 121645100408832000.0, 1.0 / 51090942171709440000.0};

/* cos x and sin x for 0 <= x < 2^40. The pairs are right to 2^-76 of their value (measured; 2^-74 is claimed), so each result is
 * the nearest float32, unless the true value is that close to half-way between two. */
INLINE void cos_sin(double x, float *cosine, float *sine) {
    double shifted = x * 0x1.45f306dc9c883p-1 + INTEGER_BITS, n = shifted - INTEGER_BITS; /* quarter turns */
    pair one = exact_product(n, 0x1.921fb54442d18p0), two = exact_product(n, 0x1.1a62633145c07p-54); /* of pi / 2 */
    pair r = pair_add(exact_sum(x, -one.high), (pair){-one.low, 0.0});
    r = pair_add(pair_add(r, (pair){-two.high, -two.low}), (pair){n * 0x1.f1976b7ed8fbcp-110, 0.0});
    pair square = pair_multiply(r, r), z = {-square.high, -square.low};
    float c = pair_to_float(pair_add((pair){1.0, 0.0}, series(z, cosine_pairs, cosine_rest)));
    float s = pair_to_float(pair_add(r, pair_multiply(r, series(z, sine_pairs, sine_rest))));
    int64_t quarter = bits_of_double(shifted);
    float turned_c = quarter & 1 ? s : c, turned_s = quarter & 1 ? c : s;
    *cosine = (quarter + 1) & 2 ? -turned_c : turned_c;
    *sine = quarter & 2 ? -turned_s : turned_s;
}
