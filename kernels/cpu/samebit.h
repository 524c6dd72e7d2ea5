/* What every CPU op shares: fused multiply-add lanes, exp, exp2 and log, and the two fixed orders of a sum.
 *
 * Bits do not depend on the machine. Every operation below is an IEEE 754 binary32 add, multiply, divide, square root or
 * fused multiply-add, written out one by one, and the build forbids the compiler to contract or reassociate them
 * (-ffp-contract=off, no -ffast-math). Vector width, thread count and instruction set only choose who computes what.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#if defined(__AVX512F__)
#define WIDTH 16
typedef __m512 lanes;
#define MM(op) _mm512_##op
#else
#define WIDTH 8
typedef __m256 lanes;
#define MM(op) _mm256_##op
#endif
#define PAIR(op, a, b) MM(castpd_ps)(MM(op)(MM(castps_pd)(a), MM(castps_pd)(b)))
static inline lanes lanes_load(const float *p) { return MM(loadu_ps)(p); }
static inline void lanes_store(float *p, lanes v) { MM(storeu_ps)(p, v); }
static inline lanes lanes_fill(float v) { return MM(set1_ps)(v); }
static inline lanes lanes_fma(lanes a, lanes b, lanes c) { return MM(fmadd_ps)(a, b, c); }
static inline lanes lanes_add(lanes a, lanes b) { return MM(add_ps)(a, b); }
static inline void lanes_transpose(lanes *v) {
    lanes a[WIDTH], b[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) a[i] = MM(unpacklo_ps)(v[i], v[i + 1]), a[i + 1] = MM(unpackhi_ps)(v[i], v[i + 1]);
    for (int i = 0; i < WIDTH; i += 4) /* part q, of 4 lanes, of b[i + c]: column 4 q + c of rows i .. i + 3 */
        for (int c = 0; c < 4; c += 2)
            b[i + c] = PAIR(unpacklo_pd, a[i + c / 2], a[i + 2 + c / 2]), b[i + c + 1] = PAIR(unpackhi_pd, a[i + c / 2], a[i + 2 + c / 2]);
    for (int c = 0; c < 4; c++) {
#if WIDTH == 16
        lanes low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x44), high = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xee);
        lanes low_ = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x44), high_ = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xee);
        v[c] = _mm512_shuffle_f32x4(low, low_, 0x88), v[4 + c] = _mm512_shuffle_f32x4(low, low_, 0xdd);
        v[8 + c] = _mm512_shuffle_f32x4(high, high_, 0x88), v[12 + c] = _mm512_shuffle_f32x4(high, high_, 0xdd);
#else
        v[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20), v[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
#endif
    }
}
#elif defined(__aarch64__)
#include <arm_neon.h>
#define WIDTH 4
typedef float32x4_t lanes;
static inline lanes lanes_load(const float *p) { return vld1q_f32(p); }
static inline void lanes_store(float *p, lanes v) { vst1q_f32(p, v); }
static inline lanes lanes_fill(float v) { return vdupq_n_f32(v); }
static inline lanes lanes_fma(lanes a, lanes b, lanes c) { return vfmaq_f32(c, a, b); }
static inline lanes lanes_add(lanes a, lanes b) { return vaddq_f32(a, b); }
static inline void lanes_transpose(lanes *v) {
    float32x4x2_t a = vtrnq_f32(v[0], v[1]), b = vtrnq_f32(v[2], v[3]);
    for (int i = 0; i < 2; i++)
        v[i] = vcombine_f32(vget_low_f32(a.val[i]), vget_low_f32(b.val[i])),
        v[2 + i] = vcombine_f32(vget_high_f32(a.val[i]), vget_high_f32(b.val[i]));
}
#else /* right on any C11 machine, and slow where fmaf is a library call */
#define WIDTH 1
typedef float lanes;
static inline lanes lanes_load(const float *p) { return *p; }
static inline void lanes_store(float *p, lanes v) { *p = v; }
static inline lanes lanes_fill(float v) { return v; }
static inline lanes lanes_fma(lanes a, lanes b, lanes c) { return fmaf(a, b, c); }
static inline lanes lanes_add(lanes a, lanes b) { return a + b; }
static inline void lanes_transpose(lanes *v) { (void)v; }
#endif

#if defined(_OPENMP)
#include <omp.h>
static inline int64_t thread_id(void) { return omp_get_thread_num(); }
#else
static inline int64_t thread_id(void) { return 0; }
#endif
#define PARALLEL_FOR _Pragma("omp parallel for schedule(static) num_threads((int)threads) if (threads > 1)")
#define SIMD _Pragma("omp simd")
#define INLINE static inline __attribute__((always_inline))

/* to[k * step + i] = rows[i][k] for WIDTH rows, k < n; zeros where there are fewer rows. */
static inline void to_columns(float *to, int64_t step, const float *const *rows, int64_t count, int64_t n) {
    int64_t k = 0;
    for (; k + WIDTH <= n; k += WIDTH) {
        lanes v[WIDTH];
        for (int i = 0; i < WIDTH; i++) v[i] = i < count ? lanes_load(rows[i] + k) : lanes_fill(0.0f);
        lanes_transpose(v);
        for (int i = 0; i < WIDTH; i++) lanes_store(to + (k + i) * step, v[i]);
    }
    for (; k < n; k++)
        for (int i = 0; i < WIDTH; i++) to[k * step + i] = i < count ? rows[i][k] : 0.0f;
}

static inline float float_of(int32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline int32_t bits_of(float x) { int32_t b; memcpy(&b, &x, 4); return b; }

/* e^t for |t| <= ln(2)/2: Taylor to t^7, error below 0.1 ulp of 1. */
static inline float exp_small(float t) {
    float p = 1.0f / 5040.0f;
    p = fmaf(p, t, 1.0f / 720.0f);
    p = fmaf(p, t, 1.0f / 120.0f);
    p = fmaf(p, t, 1.0f / 24.0f);
    p = fmaf(p, t, 1.0f / 6.0f);
    p = fmaf(p, t, 0.5f);
    p = fmaf(p, t, 1.0f);
    return fmaf(p, t, 1.0f);
}
/* p * 2^n in two exact steps, so that results below 2^-126 round once, as subnormals. */
static inline float times_power_of_two(float p, float n) {
    int32_t whole = (int32_t)n, half = whole >> 1;
    return p * float_of((half + 127) << 23) * float_of((whole - half + 127) << 23);
}
static inline float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; } /* to the nearest integer, ties to even */

static inline float exp2_f32(float x) {
    x = x < -152.0f ? -152.0f : x > 129.0f ? 129.0f : x;
    float n = nearest(x);
    return times_power_of_two(exp_small((x - n) * 0x1.62e43p-1f), n);
}
static inline float exp_f32(float x) {
    x = x < -105.0f ? -105.0f : x > 89.0f ? 89.0f : x;
    float n = nearest(x * 0x1.715476p0f);
    float t = fmaf(n, -0x1.62e4p-1f, x); /* ln 2 in two parts: n times the first is exact */
    return times_power_of_two(exp_small(fmaf(n, -0x1.7f7d1cp-20f, t)), n);
}
/* Natural logarithm of x > 0: x = 2^e m with m in [sqrt(1/2), sqrt 2), ln m = 2 artanh((m - 1) / (m + 1)). Infinity and
 * NaN stay what they are. */
static inline float log_f32(float x) {
    int tiny = x < 0x1p-126f;
    float y = tiny ? x * 0x1p24f : x;
    int32_t b = bits_of(y) - 0x3f3504f3;
    float e = (float)((b >> 23) - (tiny ? 24 : 0));
    float m = float_of((b & 0x007fffff) + 0x3f3504f3);
    float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    float p = fmaf(z, fmaf(z, fmaf(z, fmaf(z, 1.0f / 11.0f, 1.0f / 9.0f), 1.0f / 7.0f), 1.0f / 5.0f), 1.0f / 3.0f);
    float r = fmaf(2.0f * s, z * p, 2.0f * s);
    return x < INFINITY ? fmaf(e, 0x1.62e4p-1f, fmaf(e, 0x1.7f7d1cp-20f, r)) : x;
}

/* Row order: element i goes to lane i mod 16, each lane ascends, and the lanes fold by halves. */
#define ROW_LANES 16
static inline float fold_lanes(float *v, int n) {
    for (int w = n / 2; w; w /= 2)
        for (int i = 0; i < w; i++) v[i] = v[i] + v[i + w];
    return v[0];
}
static inline float row_dot(const float *a, const float *b, int64_t n) {
    float v[ROW_LANES] = {0};
    int64_t i = 0;
    for (; i + ROW_LANES <= n; i += ROW_LANES)
        SIMD for (int j = 0; j < ROW_LANES; j++) v[j] = fmaf(a[i + j], b[i + j], v[j]);
    for (int j = 0; i + j < n; j++) v[j] = fmaf(a[i + j], b[i + j], v[j]);
    return fold_lanes(v, ROW_LANES);
}

#define TREE_LEVELS 24 /* 2^24 leaves */
