"""The reduction order written a second time, slowly, in numpy: nothing here imports `kernels`.

Every function works on float32 arrays and rounds where the definition does. `fma` is exact (a test compares it with
that of libm); numpy's float32 add, multiply, divide and square root are IEEE 754.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

F4, F8 = np.float32, np.float64
Array = np.ndarray

# The tree over n leaves, with its parentheses written out. ADD is what joins two nodes.
TREE = {
    1: "0",
    2: "0+1",
    3: "(0+1)+2",
    4: "(0+1)+(2+3)",
    5: "((0+1)+(2+3))+4",
    6: "((0+1)+(2+3))+(4+5)",
    7: "((0+1)+(2+3))+((4+5)+6)",
    8: "((0+1)+(2+3))+((4+5)+(6+7))",
    11: "(((0+1)+(2+3))+((4+5)+(6+7)))+((8+9)+10)",
    13: "(((0+1)+(2+3))+((4+5)+(6+7)))+(((8+9)+(10+11))+12)",
    16: "(((0+1)+(2+3))+((4+5)+(6+7)))+(((8+9)+(10+11))+((12+13)+(14+15)))",
}
# Sixteen lanes folded by halves.
LANES = "(((0+8)+(4+12))+((2+10)+(6+14)))+(((1+9)+(5+13))+((3+11)+(7+15)))"


def evaluate(expression: str, nodes: Sequence[Any]) -> Any:
    """`expression` with node i in the place of number i."""
    return eval(re.sub(r"\d+", lambda m: f"nodes[{m[0]}]", expression), {"nodes": nodes})


def tree(nodes: Sequence[Any]) -> Any:
    return evaluate(TREE[len(nodes)], nodes)


def fma(a: Any, b: Any, c: Any) -> Array:
    """a b + c rounded once. The product of two float32 is exact in float64. The sum is rounded to odd there (two-sum
    gives the sign of what rounding dropped), and rounding that to float32 is then right: 53 >= 24 + 2 bits."""
    p, c = np.asarray(a, F8) * np.asarray(b, F8), np.asarray(c, F8)
    s = np.asarray(p + c)
    t = s - p
    dropped = (p - (s - t)) + (c - t)
    even = (np.ascontiguousarray(s).view(np.int64).reshape(s.shape) & 1) == 0
    odd = np.where((dropped != 0) & even, np.nextafter(s, np.where(dropped > 0, np.inf, -np.inf)), s)
    with np.errstate(over="ignore", under="ignore"):
        return odd.astype(F4)


def chain(a: Array, b: Array, first: int, last: int) -> Array:
    """One leaf: y[m, n] = sum of a[m, k] b[n, k] over first <= k < last, ascending, from zero."""
    y = np.zeros((a.shape[0], b.shape[0]), F4)
    for k in range(first, last):
        y = fma(a[:, k, None], b[None, :, k], y)
    return y


def contract(a: Array, b: Array, bounds: Sequence[int]) -> Array:
    return tree([chain(a, b, low, high) for low, high in pairwise(bounds)])


def e4m3(bits: Array) -> Array:
    """The numbers that e4m3 of these uint8 are: sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7f is no number."""
    exponent, mantissa = (bits >> 3 & 15).astype(int), (bits & 7).astype(F8)
    magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    return np.where(bits & 0x7F == 0x7F, np.nan, np.where(bits & 0x80, -magnitude, magnitude)).astype(F4)


def contract_fp8(x: Array, sx: Array, w: Array, sw: Array, leaves: int) -> Array:
    """Of values x [M, K], w [N, K] and scales [M, K / 128], [N / 128, K / 128]: a leaf is a chain over its blocks, and of each
    block one over its columns."""
    nodes, blocks = [], x.shape[1] // 128 // leaves
    for leaf in range(leaves):
        acc = np.zeros((len(x), len(w)), F4)
        for b in range(leaf * blocks, (leaf + 1) * blocks):
            scale = sx[:, b, None] * np.repeat(sw[:, b], 128)[None]
            acc = fma(chain(x, w, 128 * b, 128 * b + 128), scale, acc)
        nodes.append(acc)
    return tree(nodes)


def row_dot(a: Array, b: Array) -> Array:
    """Over the last dimension: element i to lane i mod 16."""
    lanes = [np.zeros(np.broadcast_shapes(a.shape, b.shape)[:-1], F4) for _ in range(16)]
    for i in range(a.shape[-1]):
        lanes[i % 16] = fma(a[..., i], b[..., i], lanes[i % 16])
    return evaluate(LANES, lanes)


def halves(x: Array) -> F4:
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def _exp_small(t: Array) -> Array:
    p = np.full(t.shape, F4(1) / F4(5040))
    for c in (F4(1) / F4(720), F4(1) / F4(120), F4(1) / F4(24), F4(1) / F4(6), F4(0.5), F4(1), F4(1)):
        p = fma(p, t, c)
    return p


def _scaled(p: Array, n: Array) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(p.astype(F8), n.astype(np.int32)).astype(F4)  # exact in float64, rounded once


def exp2(x: Any) -> Array:
    x = np.clip(np.asarray(x, F4), F4(-152), F4(129))
    n = np.rint(x)
    return _scaled(_exp_small((x - n) * F4(float.fromhex("0x1.62e43p-1"))), n)


_LN2 = F4(float.fromhex("0x1.62e4p-1")), F4(float.fromhex("0x1.7f7d1cp-20"))


def exp(x: Any) -> Array:
    x = np.clip(np.asarray(x, F4), F4(-105), F4(89))
    n = np.rint(x * F4(float.fromhex("0x1.715476p0")))
    return _scaled(_exp_small(fma(n, -_LN2[1], fma(n, -_LN2[0], x))), n)


def log(x: Any) -> Array:
    m, e = np.frexp(np.asarray(x, F4))  # m in [1/2, 1), exact
    low = m < np.frombuffer(b"\xf3\x04\x35\x3f", F4)[0]  # below sqrt(1/2)
    m, e = np.where(low, m * F4(2), m).astype(F4), (e - low).astype(F4)
    s = (m - F4(1)) / (m + F4(1))
    z, p = s * s, np.full(s.shape, F4(1) / F4(11))
    for odd in (9, 7, 5, 3):
        p = fma(z, p, F4(1) / F4(odd))
    return fma(e, _LN2[0], fma(e, _LN2[1], fma(F4(2) * s, z * p, F4(2) * s)))


class LogSumExp:
    """A node (m, s) of the vocabulary tree; + merges two."""

    def __init__(self, m: Array, s: Array) -> None:
        self.m, self.s = m, s

    def __add__(self, other: "LogSumExp") -> "LogSumExp":
        m = np.maximum(self.m, other.m)
        return LogSumExp(m, self.s * exp(self.m - m) + other.s * exp(other.m - m))


def vocab_leaf(z: Array) -> LogSumExp:
    """z [R, width]: the maximum and the sum of e^(z - m), element i to lane i mod 16."""
    m = z.max(1)
    p, lanes = exp(z - m[:, None]), [np.zeros(len(z), F4) for _ in range(16)]
    for i in range(z.shape[1]):
        lanes[i % 16] = lanes[i % 16] + p[:, i]
    return LogSumExp(m, evaluate(LANES, lanes))


def attention_row(q: Array, keys: Array, values: Array, scale: F4) -> tuple[Array, F4]:
    """One query over its keys [n, D]: splits of 512, in each an online softmax over blocks of 128. (out, base-2 lse)."""
    M, L, O = F4(-np.inf), F4(0), np.zeros(values.shape[1], F4)
    for split in range(0, len(keys), 512):
        m, l, o = F4(-np.inf), F4(0), np.zeros(values.shape[1], F4)
        for block in range(split, min(split + 512, len(keys)), 128):
            k, v = keys[block : min(block + 128, split + 512)], values[block : min(block + 128, split + 512)]
            s = row_dot(np.broadcast_to(q, k.shape), k) * scale
            top = max(m, s.max())
            p, shrink = np.zeros(128, F4), exp2(m - top)
            p[: len(k)] = exp2(s - top)
            o = o * shrink
            for j in range(len(k)):
                o = fma(p[j], v[j], o)
            l, m = fma(l, shrink, halves(p)), top
        top = max(m, M)
        a, b = exp2(M - top), exp2(m - top)
        O, L, M = fma(O, a, o * b), fma(L, a, l * b), top
    return O / L, fma(log(L), F4(float.fromhex("0x1.715476p0")), M)


def attention_gradient(
    q: Array, k: Array, v: Array, out: Array, lse: Array, d_out: Array, scale: float
) -> tuple[Array, Array, Array]:
    """Of one sequence and one kv head: q, out, d_out [n, heads, D], lse [n, heads], k, v [n, D]. Queries ascend, then
    the heads of a query, then its keys."""
    d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    scale_log2 = F4(scale * np.log2(np.e))
    for t in range(len(q)):
        for h in range(q.shape[1]):
            go, delta = d_out[t, h], row_dot(out[t, h], d_out[t, h])
            for j in range(t + 1):
                p = exp2(row_dot(q[t, h], k[j]) * scale_log2 - lse[t, h])
                ds = p * (row_dot(go, v[j]) - delta) * F4(scale)
                d_q[t, h] = fma(ds, k[j], d_q[t, h])
                d_k[j] = fma(ds, q[t, h], d_k[j])
                d_v[j] = fma(p, go, d_v[j])
    return d_q, d_k, d_v


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011), one block, in Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [right >> 32 ^ c[1] ^ k0, right & 0xFFFFFFFF, left >> 32 ^ c[3] ^ k1, left & 0xFFFFFFFF]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c


def gumbel(word: int) -> Array:
    """-ln(-ln(1 - u)) of a 32-bit word."""
    u = (F4(word >> 8) + F4(0.5)) * F4(2.0**-24) if word >> 8 else F4(word & 255) * F4(2.0**-32) + F4(2.0**-33)
    w = F4(1) - u
    return -log(u if w == 1 else log(w) * (u / (w - F4(1))))
