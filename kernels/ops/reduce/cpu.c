/* Sums over rows in tree order, tree merges of whole tensors, and sums of squares. */
#include "samebit.h"

/* y[i] = tree over leaves of (chain over the leaf's rows of x[row, i]). */
void sum_rows(const float *x, float *y, int64_t n, const int64_t *bounds, int64_t leaves, int64_t threads) {
    PARALLEL_FOR
    for (int64_t c = 0; c < n; c += ROW_LANES) {
        int64_t width = c + ROW_LANES < n ? ROW_LANES : n - c;
        float parked[TREE_LEVELS][ROW_LANES], node[ROW_LANES];
        for (int64_t leaf = 0; leaf < leaves; leaf++) {
            memset(node, 0, sizeof node);
            for (int64_t r = bounds[leaf]; r < bounds[leaf + 1]; r++)
                for (int64_t i = 0; i < width; i++) node[i] = node[i] + x[r * n + c + i];
            int level = 0;
            for (int64_t k = leaf; k & 1; k >>= 1, level++)
                for (int64_t i = 0; i < width; i++) node[i] = parked[level][i] + node[i];
            if (leaf + 1 < leaves) memcpy(parked[level], node, sizeof node);
            else
                for (level++; leaves >> level; level++)
                    if (leaves >> level & 1)
                        for (int64_t i = 0; i < width; i++) node[i] = parked[level][i] + node[i];
        }
        memcpy(y + c, node, sizeof(float) * (size_t)width);
    }
}

/* y[r] = sum of squares of row r, in row order. */
void square_rows(const float *x, float *y, int64_t rows, int64_t n, int64_t threads) {
    PARALLEL_FOR
    for (int64_t r = 0; r < rows; r++) y[r] = row_dot(x + r * n, x + r * n, n);
}
