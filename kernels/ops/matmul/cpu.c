/* y[m, n] = tree over leaves of (one fma chain over the k of the leaf, ascending, from zero) of a[m, k] * b[n, k].
 *
 * The lanes of a vector hold different outputs, so no vector width, tile or thread takes part in a sum. One operand is
 * packed into columns of lanes; the other is read in place, one broadcast scalar at a time. Which is which is free.
 */
#include "samebit.h"

#if WIDTH == 16
enum { WIDE_VECTORS = 2, WIDE_ROWS = 12, NARROW_VECTORS = 1, NARROW_ROWS = 24, THIN_VECTORS = 4, THIN_ROWS = 2 };
#elif WIDTH == 8
enum { WIDE_VECTORS = 2, WIDE_ROWS = 6, NARROW_VECTORS = 1, NARROW_ROWS = 12, THIN_VECTORS = 4, THIN_ROWS = 2 };
#else
enum { WIDE_VECTORS = 4, WIDE_ROWS = 4, NARROW_VECTORS = 1, NARROW_ROWS = 16, THIN_VECTORS = 8, THIN_ROWS = 2 };
#endif
enum { BLOCK = 16, TILE_MAX = 24 * 16 };
#define TILE wide
#define VECTORS WIDE_VECTORS
#define ROWS WIDE_ROWS
#include "tile.h"
#define TILE narrow
#define VECTORS NARROW_VECTORS
#define ROWS NARROW_ROWS
#include "tile.h"
#define TILE thin
#define VECTORS THIN_VECTORS
#define ROWS THIN_ROWS
#include "tile.h"

typedef void tile(float *, const float *, const float *, int64_t, const int64_t *, int64_t);
typedef struct {
    const float *data;
    int64_t rows, row_stride, k_stride;
} operand;

/* to[k][i] = a[first + i][k], zeros past the last row. */
static void pack_column(operand a, int64_t K, int64_t first, int64_t width, float *to) {
    int64_t rows = a.rows - first < width ? a.rows - first : width;
    const float *from = a.data + first * a.row_stride;
    if (a.k_stride == 1) {
        for (int64_t i = 0; i < width; i += WIDTH) {
            const float *row[WIDTH];
            for (int64_t j = i; j < i + WIDTH; j++) row[j - i] = j < rows ? from + j * a.row_stride : NULL;
            to_columns(to + i, width, row, rows - i, K);
        }
        return;
    }
    if (rows < width) memset(to, 0, sizeof(float) * (size_t)(K * width));
    if (a.row_stride == 1)
        for (int64_t k = 0; k < K; k++) memcpy(to + k * width, from + k * a.k_stride, sizeof(float) * (size_t)rows);
    else
        for (int64_t k0 = 0; k0 < K; k0 += BLOCK) /* block by block, so that the writes stay in cache */
            for (int64_t i = 0; i < rows; i++)
                for (int64_t k = k0; k < K && k < k0 + BLOCK; k++) to[k * width + i] = from[i * a.row_stride + k * a.k_stride];
}

/* to[i][k] = b[first + i][k], rows `step` >= K + 16 apart, zeros past the last row. */
static void pack_rows(operand b, int64_t K, int64_t first, int64_t height, float *to, int64_t step) {
    if (b.row_stride == 1 && b.k_stride != 1) {
        int64_t rows = b.rows - first < height ? b.rows - first : height;
        memset(to + rows * step, 0, sizeof(float) * (size_t)((height - rows) * step));
        for (int64_t k = 0; k < K; k += WIDTH) {
            const float *row[WIDTH];
            for (int64_t j = k; j < k + WIDTH; j++) row[j - k] = j < K ? b.data + first + j * b.k_stride : NULL;
            to_columns(to + k, step, row, K - k, rows);
        }
        return;
    }
    for (int64_t i = 0; i < height; i++) {
        const float *from = b.data + (first + i) * b.row_stride;
        if (first + i >= b.rows) memset(to + i * step, 0, sizeof(float) * (size_t)K);
        else if (b.k_stride == 1) memcpy(to + i * step, from, sizeof(float) * (size_t)K);
        else
            for (int64_t k = 0; k < K; k++) to[i * step + k] = from[k * b.k_stride];
    }
}

/* A tile's outputs, as far as there are rows. */
static void spread(const float *out, float *y, int64_t i0, int64_t rows, int64_t y_a, int64_t j0, int64_t count, int64_t y_b,
                   int64_t width) {
    int64_t filled = rows - i0 < width ? rows - i0 : width;
    for (int64_t i = 0; i < filled; i++)
        for (int64_t r = 0; r < count; r++) y[(i0 + i) * y_a + (j0 + r) * y_b] = out[r * width + i];
}

/* a runs over lanes, b is broadcast; y[i * y_a + j * y_b] for row i of a and row j of b. A single strip of b meets each
 * column of a once, as it is packed. */
static int multiply(operand a, operand b, float *y, int64_t y_a, int64_t y_b, int64_t K, const int64_t *bounds,
                    int64_t leaves, int64_t threads, tile *tile, int64_t width, int64_t height) {
    int64_t columns = (a.rows + width - 1) / width, strips = (b.rows + height - 1) / height;
    if (strips == 1) {
        int64_t step = K + 16;
        float *packed = malloc(sizeof(float) * (size_t)(height * step + threads * width * K));
        if (!packed) return 1;
        pack_rows(b, K, 0, height, packed, step);
        PARALLEL_FOR
        for (int64_t c = 0; c < columns; c++) {
            float *column = packed + height * step + thread_id() * width * K, out[TILE_MAX];
            pack_column(a, K, c * width, width, column);
            tile(out, column, packed, step, bounds, leaves);
            spread(out, y, c * width, a.rows, y_a, 0, b.rows, y_b, width);
        }
        free(packed);
        return 0;
    }
    /* A strip of b is read once for each column: with few columns in place, unless its rows would share a cache set. */
    int in_place = columns <= 2 && b.k_stride == 1 && b.row_stride >= K && b.row_stride % 1024;
    int64_t step = in_place ? b.row_stride : K + 16;
    float *packed = malloc(sizeof(float) * (size_t)(columns * K * width + threads * height * step));
    if (!packed) return 1;
    PARALLEL_FOR
    for (int64_t c = 0; c < columns; c++) pack_column(a, K, c * width, width, packed + c * K * width);
    PARALLEL_FOR
    for (int64_t s = 0; s < strips; s++) {
        int64_t j0 = s * height, count = b.rows - j0 < height ? b.rows - j0 : height;
        float *copy = packed + columns * K * width + thread_id() * height * step;
        const float *rows = in_place && count == height ? b.data + j0 * b.row_stride : copy;
        if (rows == copy) pack_rows(b, K, j0, height, copy, step);
        for (int64_t c = 0; c < columns; c++) {
            float out[TILE_MAX];
            tile(out, packed + c * K * width, rows, step, bounds, leaves);
            spread(out, y, c * width, a.rows, y_a, j0, count, y_b, width);
        }
    }
    free(packed);
    return 0;
}
#define WIDE wide, WIDE_VECTORS *WIDTH, WIDE_ROWS
#define NARROW narrow, NARROW_VECTORS *WIDTH, NARROW_ROWS
#define THIN thin, THIN_VECTORS *WIDTH, THIN_ROWS

/* a [M, K], b [N, K], with any strides; y [M, N] contiguous; bounds [leaves + 1].
 * Returns 1 if memory ran out. */
int matmul(const float *a, int64_t M, int64_t a_row, int64_t a_k, const float *b, int64_t N, int64_t b_row, int64_t b_k,
           float *y, int64_t K, const int64_t *bounds, int64_t leaves, int64_t threads) {
    operand A = {a, M, a_row, a_k}, B = {b, N, b_row, b_k};
    if (b_row == 1 && a_k == 1 && M > WIDTH) return multiply(B, A, y, 1, N, K, bounds, leaves, threads, WIDE); /* b is columns */
    if (M <= THIN_ROWS) return multiply(B, A, y, 1, N, K, bounds, leaves, threads, THIN);
    if (M <= WIDE_ROWS && M < WIDTH) return multiply(B, A, y, 1, N, K, bounds, leaves, threads, WIDE);
    if (M <= NARROW_VECTORS * WIDTH) return multiply(A, B, y, N, 1, K, bounds, leaves, threads, NARROW);
    return multiply(A, B, y, N, 1, K, bounds, leaves, threads, WIDE);
}
