/* Log-softmax over a sharded vocabulary. z = logits / temperature. A leaf is an equal part of the vocabulary; its node is
 * (m, s): m the maximum of z, s the sum of e^(z - m) in row order; (-inf, 0) where every logit is -inf (none of the leaf's
 * tokens may be drawn). Nodes merge up the tree. */
#include "samebit.h"

static inline float or_zero(float m) { return m == -INFINITY ? 0.0f : m; }

static inline void merge(float *left, const float *right) {
    float m = left[0] > right[0] ? left[0] : right[0], from = or_zero(m);
    left[1] = left[1] * exp_f32(left[0] - from) + right[1] * exp_f32(right[0] - from);
    left[0] = m;
}

/* logits [rows, n] with n = leaves * width; nodes [rows, leaves, 2]. */
void vocab_nodes(const float *logits, const float *temperature, float *nodes, int64_t rows, int64_t leaves, int64_t width,
                 int64_t threads) {
    PARALLEL_FOR
    for (int64_t task = 0; task < rows * leaves; task++) {
        const float *x = logits + task * width, t = temperature[task / leaves];
        float m = -INFINITY, lane[ROW_LANES] = {0};
        for (int64_t i = 0; i < width; i++) {
            float z = x[i] / t;
            m = z > m ? z : m;
        }
        int64_t i = 0;
        float from = or_zero(m);
        for (; i + ROW_LANES <= width; i += ROW_LANES)
            SIMD for (int j = 0; j < ROW_LANES; j++) lane[j] = lane[j] + exp_f32(x[i + j] / t - from);
        for (int j = 0; i + j < width; j++) lane[j] = lane[j] + exp_f32(x[i + j] / t - from);
        nodes[2 * task] = m;
        nodes[2 * task + 1] = fold_lanes(lane, ROW_LANES);
    }
}

/* root[r] = (m, s) of all leaves of row r; leaves a power of two; nodes are used up. */
static void fold_nodes(float *nodes, int64_t leaves) {
    for (int64_t step = 1; step < leaves; step *= 2)
        for (int64_t i = 0; i < leaves; i += 2 * step) merge(nodes + 2 * i, nodes + 2 * (i + step));
}

/* logprob[r] = (picked[r] / temperature[r] - m) - ln s, and lse[r] = m + ln s. */
void vocab_logprob(float *nodes, const float *picked, const float *temperature, float *logprob, float *lse, int64_t rows,
                   int64_t leaves, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        float *root = nodes + 2 * r * leaves;
        fold_nodes(root, leaves);
        float ln = log_f32(root[1]);
        logprob[r] = (picked[r] / temperature[r] - root[0]) - ln;
        lse[r] = root[0] + ln;
    }
}

/* In place: logits -> d_logits = d_logprob (1[target] - e^(z - lse)) / temperature. */
void vocab_backward(float *logits, const float *temperature, const float *lse, const int64_t *target,
                    const float *d_logprob, int64_t rows, int64_t n, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) {
        float *x = logits + r * n, t = temperature[r], g = d_logprob[r] / t, l = lse[r];
        float own = 1.0f - exp_f32(x[target[r]] / t - l);
        SIMD for (int64_t i = 0; i < n; i++) x[i] = -(g * exp_f32(x[i] / t - l));
        x[target[r]] = g * own;
    }
}
