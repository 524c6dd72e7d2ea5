/* Normal numbers by the ziggurat (Marsaglia and Tsang 2000, "The ziggurat method for generating random variables") over the
 * words of Philox4x64-10 (Salmon et al. 2011, section 4).
 *
 * 256 layers of one area under e^(-x^2 / 2); layer 0 is the lowest, which the tail belongs to. A draw takes 32 bits: 8 choose
 * the layer, 1 the sign, 23 the place in it. What lies inside the layer above it is under the curve for sure (99 of 100).
 */
#include "wide.h"

#define EDGE 0x1.d3bb48209ad33p+1 /* where the tail begins: 256 layers then fit */
#define AREA 0x1.43016a5a43732p-8 /* of a layer: EDGE e^(-EDGE^2 / 2) + the integral from EDGE on */

typedef struct { uint64_t key[2], block, word[4]; int used; } stream; /* `used` of the 8 halves of `word` */

static void next_block(stream *s) {
    uint64_t c[4] = {++s->block, 0, 0, 0}, k0 = s->key[0], k1 = s->key[1];
    for (int round = 0; round < 10; round++) {
        unsigned __int128 a = (unsigned __int128)0xD2E7470EE14C6C93u * c[0];
        unsigned __int128 b = (unsigned __int128)0xCA5A826395121157u * c[2];
        uint64_t n0 = (uint64_t)(b >> 64) ^ c[1] ^ k0, n2 = (uint64_t)(a >> 64) ^ c[3] ^ k1;
        c[1] = (uint64_t)b;
        c[3] = (uint64_t)a;
        c[0] = n0;
        c[2] = n2;
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    memcpy(s->word, c, sizeof c);
    s->used = 0;
}
static inline uint32_t next_bits(stream *s) { /* the low half of a word, then its high half */
    if (s->used == 8) next_block(s);
    uint64_t word = s->word[s->used / 2];
    return (uint32_t)(s->used++ & 1 ? word >> 32 : word);
}
static inline float next_fraction(stream *s) { return (float)(next_bits(s) >> 8) * 0x1p-24f; } /* in [0, 1) */

/* Of each layer: its width / 2^23, the places that are inside for sure, and the curve's height at its outer edge. */
typedef struct { float width[256], height[256]; uint32_t inside[256]; } ziggurat;

static double curve(double x) { return exp_f64(-0.5 * x * x); }

static void set_layer(ziggurat *z, int i, double edge, double inner) {
    z->width[i] = (float)(edge * 0x1p-23);
    z->inside[i] = (uint32_t)(inner / edge * 0x1p23 + 0.5);
    z->height[i] = (float)curve(edge);
}
static void make_layers(ziggurat *z) {
    set_layer(z, 0, AREA / curve(EDGE), EDGE); /* as wide as its area, tail included, over its height */
    z->height[0] = 1.0f;                       /* of the peak, which bounds layer 1 from above */
    double edge = EDGE;
    for (int i = 255; i > 0; i--) {
        double inner = i > 1 ? sqrt(-2.0 * log_f64(AREA / edge + curve(edge))) : 0.0;
        set_layer(z, i, edge, inner);
        edge = inner;
    }
}

/* How far beyond EDGE, by Marsaglia's exact rejection (1964); -ln(1 - u) is rounded correctly for each of its 2^24 arguments. */
static float tail(stream *s) {
    for (;;) {
        float x = (float)(1.0 / EDGE) * -(float)log_f64(1.0 - (double)next_fraction(s));
        float y = -(float)log_f64(1.0 - (double)next_fraction(s));
        if (y + y > x * x) return x;
    }
}
static float draw(stream *s, const ziggurat *z) {
    for (;;) {
        uint32_t bits = next_bits(s), place = bits >> 9;
        int layer = bits & 255;
        float x = (float)place * z->width[layer];
        if (bits & 256) x = -x;
        if (place < z->inside[layer]) return x;
        if (layer == 0) {
            float far = (float)EDGE + tail(s);
            return place & 256 ? -far : far;
        }
        float y = (z->height[layer - 1] - z->height[layer]) * next_fraction(s) + z->height[layer];
        if ((double)y < exp_f64(-0.5 * (double)x * (double)x)) return x;
    }
}

/* out [n] = deviation times the numbers of stream (seed, name), one after another. */
void normal(int64_t seed, int64_t name, float deviation, float *out, int64_t n, int64_t threads) {
    (void)threads;
    stream s = {{(uint64_t)seed, (uint64_t)name}, 0, {0}, 8};
    ziggurat z;
    make_layers(&z);
    for (int64_t i = 0; i < n; i++) out[i] = deviation * draw(&s, &z);
}
