/* Gumbel-max sampling. The token drawn is argmax over v of z[v] + gumbel(seed, position, v), z = logits / temperature; the
 * lowest id wins a tie. The noise is counter-based, so no draw depends on batch, order or shard.
 *
 * gumbel = -ln E, E = -ln(1 - u) exponential; u in (0, 1) from 32 bits of Philox4x32-10 (Salmon et al. 2011, "Parallel
 * random numbers: as easy as 1, 2, 3", section 4) with key = seed and counter = (v / 4, position, 0, 0), word v mod 4.
 */
#include "samebit.h"

static inline void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
        c[1] = (uint32_t)b;
        c[3] = (uint32_t)a;
        c[0] = n0;
        c[2] = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

/* -ln(1 - u) with full relative precision for small u (Kahan's correction of ln(1 + x)). */
static inline float exponential(uint32_t bits) {
    float u = ((float)(bits >> 8) + 0.5f) * 0x1p-24f, low = (float)(bits & 255) * 0x1p-32f;
    u = u < 1.0f ? u : 0x1.fffffep-1f; /* the largest of them rounds to 1 */
    u = bits >> 8 ? u : low + 0x1p-33f; /* below 2^-24 the low byte carries the precision */
    float w = 1.0f - u;
    return w == 1.0f ? u : log_f32(w) * (u / (w - 1.0f));
}

/* uniform 32-bit words of (seed, position, id), for tests against another Philox. */
void noise_words(int64_t seed, int64_t position, int64_t ids, uint32_t *words, int64_t threads) {
    PARALLEL_FOR
    for (int64_t v = 0; v < ids; v += 4) {
        uint32_t c[4] = {(uint32_t)(v / 4), (uint32_t)position, (uint32_t)((uint64_t)position >> 32), 0};
        philox(c, (uint32_t)seed, (uint32_t)((uint64_t)seed >> 32));
        for (int64_t i = 0; i < 4 && v + i < ids; i++) words[v + i] = c[i];
    }
}

/* logits [rows, n] of ids first_id .. first_id + n, first_id a multiple of 4; greedy rows add no noise.
 * best [rows]: the score of the winner; id [rows]; picked [rows]: its logit. */
void gumbel_argmax(const float *logits, const float *temperature, const int64_t *seed, const int64_t *position,
                   const uint8_t *greedy, float *best, int64_t *id, float *picked, int64_t rows, int64_t n,
                   int64_t first_id, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * n;
        best[r] = -INFINITY;
        id[r] = -1;
        picked[r] = 0.0f;
        for (int64_t v = 0; v < n; v += 4) {
            uint32_t c[4] = {(uint32_t)((first_id + v) / 4), (uint32_t)position[r],
                             (uint32_t)((uint64_t)position[r] >> 32), 0};
            if (!greedy[r]) philox(c, (uint32_t)seed[r], (uint32_t)((uint64_t)seed[r] >> 32));
            for (int64_t i = 0; i < 4 && v + i < n; i++) {
                float score = x[v + i] / temperature[r];
                if (!greedy[r]) score = score - log_f32(exponential(c[i]));
                if (score > best[r]) {
                    best[r] = score;
                    id[r] = first_id + v + i;
                    picked[r] = x[v + i];
                }
            }
        }
    }
}
