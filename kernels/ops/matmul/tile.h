/* One tile of matmul, written once and included for each (TILE, VECTORS, ROWS): VECTORS lane vectors by ROWS broadcast
 * rows, as many accumulators as the register file holds. */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define CHAIN JOIN(chain_, TILE)

/* One leaf: out[r][i] = sum over k0 <= k < k1 of column[k][i] * row[r][k], from zero, ascending. Row r starts at
 * row + r * step. */
INLINE void CHAIN(float *out, const float *column, const float *row, int64_t step, int64_t k0, int64_t k1) {
    lanes sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sum[r][v] = lanes_fill(0.0f);
    const float *x = column + k0 * VECTORS * WIDTH, *b = row + k0;
    for (int64_t k = k0; k < k1; k++, x += VECTORS * WIDTH, b++) {
        lanes c[VECTORS];
        for (int v = 0; v < VECTORS; v++) c[v] = lanes_load(x + v * WIDTH);
#pragma GCC unroll 24
        for (int r = 0; r < ROWS; r++) {
            lanes one = lanes_fill(b[r * step]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[r][v] = lanes_fma(c[v], one, sum[r][v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) lanes_store(out + (r * VECTORS + v) * WIDTH, sum[r][v]);
}

/* All leaves, merged in tree order. */
static void TILE(float *out, const float *column, const float *row, int64_t step, const int64_t *bounds, int64_t leaves) {
    enum { SIZE = VECTORS * WIDTH * ROWS };
    float parked[TREE_LEVELS][SIZE];
#define MERGE(l) SIMD for (int i = 0; i < SIZE; i++) out[i] = parked[l][i] + out[i]
    for (int64_t leaf = 0; leaf < leaves; leaf++) {
        CHAIN(out, column, row, step, bounds[leaf], bounds[leaf + 1]);
        int level = 0; /* a binary counter: leaf i closes as many levels as i has trailing one bits */
        for (int64_t n = leaf; n & 1; n >>= 1, level++) MERGE(level);
        if (leaf + 1 < leaves) memcpy(parked[level], out, sizeof parked[level]);
        else /* a count that is no power of two leaves finished subtrees on the left: add them from the right */
            for (level++; leaves >> level; level++)
                if (leaves >> level & 1) MERGE(level);
    }
#undef MERGE
}
#undef CHAIN
#undef TILE
#undef VECTORS
#undef ROWS
