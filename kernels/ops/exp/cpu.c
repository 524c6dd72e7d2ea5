/* y = e^x, elementwise. */
#include "samebit.h"

void exponential(const float *x, float *y, int64_t n, int64_t threads) {
    PARALLEL_FOR
    for (int64_t i = 0; i < n; i++) y[i] = exp_f32(x[i]);
}
