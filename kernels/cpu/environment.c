/* Whether this thread computes as IEEE 754 does by default: subnormals kept, rounding to nearest. A library that was built with
 * -ffast-math, or torch.set_flush_denormal, may have changed that for a whole process. */
#include <stdint.h>

int32_t is_ieee(void) {
    volatile float least = 0x1p-149f, one = 1.0f, half = 0x1p-24f; /* volatile: not for the compiler to know */
    return least * one > 0.0f && one + half == 1.0f && one + half * 1.5f > 1.0f;
}
