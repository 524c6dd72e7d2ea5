/* The k largest logits of each token and their shares of the softmax. `scratch` has room for 2 W floats a token, W: `experts`
 * rounded up to a power of two. */
#include "samebit.h"

static float folded(float *v, int64_t W) { /* halves are added until one is left */
    for (int64_t h = W / 2; h > 0; h /= 2)
        for (int64_t i = 0; i < h; i++) v[i] = v[i] + v[i + h];
    return v[0];
}

static float rank(float x) { return x == x ? x : INFINITY; } /* what is no number comes first */

static void exponentials(const float *logits, float *e, int64_t experts) {
    float top = -INFINITY;
    for (int64_t j = 0; j < experts; j++) top = rank(logits[j]) > top ? rank(logits[j]) : top;
    for (int64_t j = 0; j < experts; j++) e[j] = exp_f32(logits[j] - top);
}

void route(const float *logits, int32_t *ids, float *weights, float *scratch, int64_t rows, int64_t experts, int64_t W, int64_t k,
           int64_t normalize, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        const float *x = logits + r * experts;
        float *e = scratch + 2 * W * r, *sum = e + W;
        int32_t *chosen = ids + r * k;
        exponentials(x, e, experts);
        if (k == experts)
            for (int64_t i = 0; i < k; i++) chosen[i] = (int32_t)i;
        for (int64_t i = 0; i < k && k < experts; i++) { /* insert in ascending id */
            int64_t best = -1;
            for (int64_t j = 0; j < experts; j++) {
                int taken = 0;
                for (int64_t c = 0; c < i; c++) taken |= chosen[c] == j;
                if (!taken && (best < 0 || rank(x[j]) > rank(x[best]))) best = j;
            }
            int64_t at = i;
            for (; at > 0 && chosen[at - 1] > best; at--) chosen[at] = chosen[at - 1];
            chosen[at] = (int32_t)best;
        }
        memset(sum, 0, sizeof(float) * (size_t)W);
        if (normalize)
            for (int64_t i = 0; i < k; i++) sum[chosen[i]] = e[chosen[i]];
        else
            memcpy(sum, e, sizeof(float) * (size_t)experts);
        float total = folded(sum, W);
        for (int64_t i = 0; i < k; i++) weights[r * k + i] = e[chosen[i]] / total;
    }
}

/* d_logit_j = share_j (g_j - sum_i share_i g_i), g_j = 0 where j was not chosen; the shares are among the chosen, or among all. */
void route_backward(const float *logits, const int32_t *ids, const float *weights, const float *d_weights, float *d_logits,
                    float *scratch, int64_t rows, int64_t experts, int64_t W, int64_t k, int64_t normalize, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        float *share = scratch + 2 * W * r, *product = share + W, *out = d_logits + r * experts;
        const int32_t *chosen = ids + r * k;
        memset(product, 0, sizeof(float) * (size_t)W);
        if (normalize) {
            memset(share, 0, sizeof(float) * (size_t)W);
            for (int64_t i = 0; i < k; i++) share[chosen[i]] = weights[r * k + i];
        } else {
            exponentials(logits + r * experts, share, experts);
            memcpy(product, share, sizeof(float) * (size_t)experts);
            float total = folded(product, W);
            for (int64_t j = 0; j < experts; j++) share[j] = share[j] / total;
            memset(product, 0, sizeof(float) * (size_t)W);
        }
        for (int64_t j = 0; j < experts; j++) out[j] = 0.0f;
        for (int64_t i = 0; i < k; i++) {
            out[chosen[i]] = d_weights[r * k + i];
            product[chosen[i]] = share[chosen[i]] * d_weights[r * k + i];
        }
        float total = folded(product, W);
        for (int64_t j = 0; j < experts; j++) out[j] = share[j] * (out[j] - total);
    }
}
