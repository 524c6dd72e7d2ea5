/* AdamW (Loshchilov and Hutter 2019, algorithm 2), elementwise, in place. The gradient is used as grad * grad_scale. */
#include "samebit.h"

void adamw(float *w, const float *grad, float *m, float *v, int64_t n, float grad_scale, float lr, float beta1,
           float beta2, float eps, float decay, float correction1, float correction2, int64_t threads) {
    PARALLEL_FOR
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * grad_scale;
        m[i] = fmaf(beta1, m[i], (1.0f - beta1) * g);
        v[i] = fmaf(beta2, v[i], (1.0f - beta2) * (g * g));
        float step = (m[i] / correction1) / (sqrtf(v[i] / correction2) + eps);
        w[i] = fmaf(-lr, step, w[i] * (1.0f - lr * decay));
    }
}
