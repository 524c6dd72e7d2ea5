/* Gradient of a row gather: d_weight[v] = tree over leaves of (chain over the leaf's tokens with id v, ascending). A leaf
 * that never uses v is the node +0, which changes no sum that starts from +0, so it is skipped. */
#include "samebit.h"

/* order [tokens]: token numbers sorted by id, ascending within an id; first [vocab + 1]: where each id starts in it;
 * leaf [tokens]: leaf of each token; d_weight [vocab, n]. */
void embedding_backward(const float *d_y, const int64_t *order, const int64_t *first, const int32_t *leaf,
                        float *d_weight, int64_t vocab, int64_t n, int64_t leaves, int64_t threads) {
    PARALLEL_FOR
    for (int64_t v = 0; v < vocab; v++) {
        for (int64_t c = 0; c < n; c += ROW_LANES) {
            int64_t width = c + ROW_LANES < n ? ROW_LANES : n - c;
            float parked[TREE_LEVELS][ROW_LANES] = {{0}}, root[ROW_LANES];
            int64_t at = first[v], seen = 0; /* `seen` leaves are in the counter, the empty ones as +0 */
            while (at < first[v + 1]) {
                int64_t here = leaf[order[at]];
                float node[ROW_LANES] = {0};
                for (; at < first[v + 1] && leaf[order[at]] == here; at++)
                    for (int64_t i = 0; i < width; i++) node[i] = node[i] + d_y[order[at] * n + c + i];
                for (; seen <= here; seen++) {
                    int level = 0;
                    float value[ROW_LANES] = {0};
                    if (seen == here) memcpy(value, node, sizeof value);
                    for (int64_t k = seen; k & 1; k >>= 1, level++)
                        for (int64_t i = 0; i < width; i++) value[i] = parked[level][i] + value[i];
                    memcpy(parked[level], value, sizeof value);
                }
            }
            memset(root, 0, sizeof root);
            int level = 0;
            for (; leaves >> level; level++) /* nodes on the right of the last leaf seen are +0 */
                if (seen >> level & 1)
                    for (int64_t i = 0; i < width; i++) root[i] = parked[level][i] + root[i];
            memcpy(d_weight + v * n + c, root, sizeof(float) * (size_t)width);
        }
    }
}
