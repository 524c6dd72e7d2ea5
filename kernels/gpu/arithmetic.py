"""Exponentials, logarithms, folds and counter-based noise for Triton kernels.

`exp_f32` and `log_f32` are the operations of samebit.h one by one, so their bits are those of the CPU. They hold
only in kernels launched with `enable_fp_fusion=False`: otherwise ptxas contracts a multiply and an add into one rounding.

A sum over an axis of two is one commutative addition, so `fold` has one order whatever the layout and number of warps are;
`tl.sum` over a longer axis depends on the number of warps.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp_small(t):
    """Computes e^t for |t| <= ln(2) / 2."""
    p = tl.full(t.shape, 1.0 / 5040.0, tl.float32)
    p = tl.fma(p, t, 1.0 / 720.0)
    p = tl.fma(p, t, 1.0 / 120.0)
    p = tl.fma(p, t, 1.0 / 24.0)
    p = tl.fma(p, t, 1.0 / 6.0)
    p = tl.fma(p, t, 0.5)
    p = tl.fma(p, t, 1.0)
    return tl.fma(p, t, 1.0)


@triton.jit
def times_power_of_two(p, n):
    """Computes p * 2^n in two exact steps."""
    whole = n.to(tl.int32)
    half = whole >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    return p * low * high


@triton.jit
def nearest(x):
    """Rounds float32 x to the nearest integer, ties to even, for |x| up to 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clamp(x, low, high):
    """Limits x to low .. high; a NaN stays what it is."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def exp_f32(x):
    """Computes e^x in float32 with the operations of samebit.h."""
    x = clamp(x, -105.0, 89.0)
    n = nearest(x * 1.44269502162933349609375)
    t = tl.fma(n, -0.693145751953125, x)
    return times_power_of_two(exp_small(tl.fma(n, -1.428606765330187045037746429443359375e-06, t)), n)


@triton.jit
def log_f32(x):
    """Computes the natural logarithm of x > 0; infinity and NaN stay what they are."""
    tiny = x < 1.1754943508222875e-38
    y = tl.where(tiny, x * 16777216.0, x)
    b = y.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = ((b >> 23) - tl.where(tiny, 24, 0)).to(tl.float32)
    m = ((b & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    z = s * s
    p = tl.full(x.shape, 1.0 / 11.0, tl.float32)
    p = tl.fma(z, p, 1.0 / 9.0)
    p = tl.fma(z, p, 1.0 / 7.0)
    p = tl.fma(z, p, 1.0 / 5.0)
    p = tl.fma(z, p, 1.0 / 3.0)
    r = tl.fma(2.0 * s, z * p, 2.0 * s)
    y = tl.fma(e, 0.693145751953125, tl.fma(e, 1.428606765330187045037746429443359375e-06, r))
    return tl.where(x < float("inf"), y, x)


@triton.jit
def fold(v):
    """Folds v [R, W] -> [R]: halves are added, v[i] + v[i + W / 2], until one is left. W a power of two."""
    R: tl.constexpr = v.shape[0]
    W: tl.constexpr = v.shape[1]
    if W == 1:
        return tl.reshape(v, (R,))
    else:
        return fold(tl.sum(tl.reshape(v, (R, 2, W // 2)), 1))


@triton.jit
def fold_neighbours(v):
    """Folds v [S, W] -> [W]: neighbours are added, v[2 i] + v[2 i + 1], until one is left. S a power of two."""
    S: tl.constexpr = v.shape[0]
    W: tl.constexpr = v.shape[1]
    if S == 1:
        return tl.reshape(v, (W,))
    else:
        return fold_neighbours(tl.sum(tl.reshape(v, (S // 2, 2, W)), 1))


@triton.jit
def fold_to(v, TO: tl.constexpr):
    """Folds in the same way, until TO columns are left."""
    R: tl.constexpr = v.shape[0]
    W: tl.constexpr = v.shape[1]
    if W == TO:
        return v
    else:
        return fold_to(tl.sum(tl.reshape(v, (R, 2, W // 2)), 1), TO)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Computes Philox4x32-10 (Salmon et al. 2011, section 4); uint32 in and out."""
    for _ in tl.static_range(10):
        n0 = tl.umulhi(c2, 0xCD9E8D57) ^ c1 ^ k0
        n2 = tl.umulhi(c0, 0xD2511F53) ^ c3 ^ k1
        c1 = c2 * 0xCD9E8D57
        c3 = c0 * 0xD2511F53
        c0 = n0
        c2 = n2
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3
