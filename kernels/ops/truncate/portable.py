"""GPU truncation: the operations of cpu.c one by one, so the integers are the CPU's.

Nothing is sorted. What a filter keeps is what lies above a threshold, and the first few of what lies on it. A threshold is
found two bits at a time, by counting (top-k) or weighing (top-p) what lies above; all sums are of integers.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import exp_f32
from kernels.gpu.launch import cdiv, launch

BLOCK = 4096
"""Tokens of a row that are looked at at once."""


@triton.jit
def weights_kernel(logits, temperature, top, weight, n, BLOCK: tl.constexpr):
    """Computes BLOCK of one row's integer weights."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + r * n + i, mask=i < n, other=float("-inf"))
    z = tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + tl.load(temperature + r))
    e = exp_f32(z - tl.load(top + r)) * 1099511627776.0
    tl.store(weight + r * n + i, tl.where(e == e, e, 0.0).to(tl.int64), mask=i < n)


@triton.jit
def keys_at(logits, i, n):
    """Returns int64 keys in the order of the logits, from 1 to 2^32 - 1: zeros of both signs are equal, no number is
    above all numbers. 0 past the end."""
    x = tl.load(logits + i, mask=i < n, other=0.0)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return tl.where(i < n, tl.where(x == x, key, 4294967295), 0)


@triton.jit
def amount(weight, i, n, key, WEIGHED: tl.constexpr):
    """Returns what each token adds to a sum of weights, or, not WEIGHED, to a count of tokens."""
    if WEIGHED:
        return tl.load(weight + i, mask=i < n, other=0)
    else:
        return (key > 0).to(tl.int64)


@triton.jit
def threshold(logits, weight, n, need, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the largest key such that the tokens of this key or above are at least `need`, or weigh as much."""
    low = tl.zeros((), tl.int64)
    for step in range(16):
        digit = tl.full((), 1, tl.int64) << (30 - 2 * step)
        one = tl.zeros((BLOCK,), tl.int64)
        two = tl.zeros((BLOCK,), tl.int64)
        three = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, n, BLOCK):
            i = start + tl.arange(0, BLOCK)
            key = keys_at(logits, i, n)
            w = amount(weight, i, n, key, WEIGHED)
            one += tl.where(key >= low + digit, w, 0)
            two += tl.where(key >= low + 2 * digit, w, 0)
            three += tl.where(key >= low + 3 * digit, w, 0)
        found = (tl.sum(one, 0).to(tl.float64) >= need).to(tl.int64)
        found += (tl.sum(two, 0).to(tl.float64) >= need).to(tl.int64)
        found += (tl.sum(three, 0).to(tl.float64) >= need).to(tl.int64)
        low += found * digit
    return low


@triton.jit
def above(logits, weight, n, key, BLOCK: tl.constexpr):
    """Returns (tokens above the key, what they weigh, what one token on the key weighs)."""
    tokens = tl.zeros((BLOCK,), tl.int64)
    heavy = tl.zeros((BLOCK,), tl.int64)
    on = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        k = keys_at(logits, i, n)
        w = tl.load(weight + i, mask=i < n, other=0)
        tokens += (k > key).to(tl.int64)
        heavy += tl.where(k > key, w, 0)
        on = tl.where(k == key, tl.maximum(on, w), on)
    return tl.sum(tokens, 0), tl.sum(heavy, 0), tl.max(on, 0)


@triton.jit
def kept_kernel(logits, weight, top_k, top_p, min_p, kept, n, BLOCK: tl.constexpr):
    """Marks the tokens of one row that all three filters keep."""
    r = tl.program_id(0).to(tl.int64)
    logits += r * n
    weight += r * n
    kept += r * n
    k = tl.load(top_k + r)
    p = tl.load(top_p + r)
    least = tl.load(min_p + r).to(tl.float64) * 1099511627776.0

    highest = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n, BLOCK):
        highest = tl.maximum(highest, keys_at(logits, start + tl.arange(0, BLOCK), n))
    highest = tl.max(highest, 0)

    k_key = tl.zeros((), tl.int64)  # a threshold of 0 cuts nothing
    if (k > 0) & (k < n):
        k_key = threshold(logits, weight, n, k.to(tl.float64), False, BLOCK)
    k_above, mass, k_weight = above(logits, weight, n, k_key, BLOCK)
    k_ties = k - k_above  # of those on the threshold, how many pass
    if k_key > 0:
        mass += k_ties * k_weight
    p_key = tl.zeros((), tl.int64)
    share = p.to(tl.float64) * mass.to(tl.float64)
    if p < 1.0:
        p_key = threshold(logits, weight, n, share, True, BLOCK)
    _, p_before, _ = above(logits, weight, n, p_key, BLOCK)

    k_seen = tl.zeros((), tl.int64)
    p_seen = tl.zeros((), tl.int64)
    first_seen = tl.zeros((), tl.int64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = keys_at(logits, i, n)
        w = tl.load(weight + i, mask=i < n, other=0)
        k_on = (key == k_key).to(tl.int64)
        p_on = (key == p_key).to(tl.int64)
        first = (key == highest).to(tl.int64)
        k_place = k_seen + tl.cumsum(k_on, 0) - k_on
        before = p_before + (p_seen + tl.cumsum(p_on, 0) - p_on) * w
        first_place = first_seen + tl.cumsum(first, 0) - first
        passes = (key > k_key) | ((k_on == 1) & (k_place < k_ties))
        passes &= (key > p_key) | ((p_on == 1) & (before.to(tl.float64) < share))
        passes &= w.to(tl.float64) >= least
        passes |= (first == 1) & (first_place == 0)
        tl.store(kept + i, passes.to(tl.uint8), mask=i < n)
        k_seen += tl.sum(k_on, 0)
        p_seen += tl.sum(p_on, 0)
        first_seen += tl.sum(first, 0)


def kept(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Marks the tokens that the filters keep with 1: -> uint8 [R, V]. The most likely one always stays."""
    rows, n = logits.shape
    logits, temperature = logits.contiguous(), temperature.contiguous()
    weight = torch.empty(rows, n, dtype=torch.int64, device=logits.device)
    out = torch.empty(rows, n, dtype=torch.uint8, device=logits.device)
    if rows and n:
        top = logits.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1) / temperature
        launch(weights_kernel, (rows, cdiv(n, 1024)), logits, temperature, top, weight, n, 1024, enable_fp_fusion=False)
        columns = (t.contiguous() for t in (top_k, top_p, min_p))
        launch(kept_kernel, (rows,), logits, weight, *columns, out, n, BLOCK, num_warps=16, enable_fp_fusion=False)
    return out
