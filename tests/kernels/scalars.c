/* exp, exp2, log and the row sum of samebit.h over arrays, for test_scalars.py. */
#include "samebit.h"

void apply_exp(const float *x, float *y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = exp_f32(x[i]); }
void apply_exp2(const float *x, float *y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = exp2_f32(x[i]); }
void apply_log(const float *x, float *y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = log_f32(x[i]); }
float apply_row_dot(const float *a, const float *b, int64_t n) { return row_dot(a, b, n); }

/* Those of wide.h. */
#include "wide.h"
void apply_exp_f64(const double *x, double *y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = exp_f64(x[i]); }
void apply_log_f64(const double *x, double *y, int64_t n) { for (int64_t i = 0; i < n; i++) y[i] = log_f64(x[i]); }
