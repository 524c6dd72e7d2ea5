"""GPU sampling: noise and scores are the operations of cpu.c one by one, so a draw is the CPU's where the logits are.

Two exact logarithms an id are much work for a vocabulary, and few ids can win. So a block first finds what each score is at
most, with the device's fast logarithm: -ln(-ln(1 - u)) <= -ln u, of which the error is below 1e-4, and SLACK far above that.
One block a row does the rest: the exact score of the id for which that is highest is a bar, and it computes the exact scores of
the ids that may reach it, four at a time (they share a call of Philox), in the few chunks that have any.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import log_f32, philox
from kernels.gpu.launch import cdiv, launch, next_power_of_2

CHUNK = 4096
"""Ids of one block."""
SLACK = tl.constexpr(2e-3)
"""How far the bound of the winner's score may be below the bar; and so much of its size (`ROUNDING`)."""
ROUNDING = tl.constexpr(1e-6)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def words_of(seed, position, first, FOURS: tl.constexpr):
    """Returns uint32 [4 FOURS]: the noise words of ids 4 first .. 4 (first + FOURS)."""
    zero = tl.zeros((FOURS,), tl.uint32)
    c0 = (first + tl.arange(0, FOURS)).to(tl.uint32)
    c1 = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    c2 = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0 = zero + (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = philox(c0, c1, c2, zero, k0, k1)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * FOURS,))


@triton.jit
def exponential(bits):
    """Computes -ln(1 - u), with Kahan's correction of ln(1 + x)."""
    top = (bits >> 8).to(tl.int32)
    u = (top.to(tl.float32) + 0.5) * 5.9604644775390625e-08
    u = tl.minimum(u, 0.999999940395355225)  # the largest of them rounds to 1
    low = (bits & 255).to(tl.int32).to(tl.float32) * 2.3283064365386962890625e-10
    u = tl.where(top != 0, u, low + 1.16415321826934814453125e-10)
    w = 1.0 - u
    rest = tl.where(w == 1.0, -1.0, w - 1.0)
    return tl.where(w == 1.0, u, log_f32(w) * tl.div_rn(u, rest))


@triton.jit
def near_log2(x):
    """Computes log2 x by the device's fast instruction, whose error is bounded and whose bits are nobody's contract."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def most_gumbel(bits):
    """Computes -ln u with an error below 1e-4, u as in `exponential`: what -ln(-ln(1 - u)) is at most, and nearly where u is
    small."""
    few = bits < 256
    u = tl.where(few, bits, (bits & 0xFFFFFF00) | 0x80).to(tl.float32)
    return 22.18070977791825 - _LN_2 * near_log2(tl.where(few, u + 0.5, u))  # 32 ln 2


@triton.jit
def scores(logits, temperature, seed, position, noisy, v, first_four, n, first_id, FOURS: tl.constexpr):
    """Returns the exact scores of the 4 FOURS ids `v`, which begin at 4 first_four; -inf where there is no number or no id."""
    x = tl.load(logits + v, mask=v < n, other=float("-inf"))
    score = tl.div_rn(x, tl.zeros((4 * FOURS,), tl.float32) + temperature)
    if noisy:
        score = score - log_f32(exponential(words_of(seed, position, first_id // 4 + first_four, FOURS)))
    return tl.where((score == score) & (v < n), score, float("-inf"))


@triton.jit
def most_scores(row, t, seed, position, chunk, n, first_id, CHUNK: tl.constexpr):
    """Returns (ids of a chunk, what their scores are at most; -inf where there is no number or no id)."""
    v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(row + v, mask=v < n, other=float("-inf"))
    most = x * tl.div_rn(1.0, t) + most_gumbel(words_of(seed, position, (first_id + chunk * CHUNK) // 4, CHUNK // 4))
    return v, tl.where((most == most) & (v < n), most, float("-inf"))


@triton.jit
def best_of_chunk(logits, temperature, seeds, positions, greedy, best, ids, n, stride, first_id, CHUNK: tl.constexpr):
    """Finds, of a row's CHUNK ids, what the best score is at most. Of a greedy row, which has no noise: the best score, and the
    lowest id that has it."""
    r = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    t = tl.load(temperature + r)
    seed, position = tl.load(seeds + r), tl.load(positions + r)
    row = logits + r * stride
    at = r * tl.num_programs(0) + chunk
    if tl.load(greedy + r) == 0:
        _, most = most_scores(row, t, seed, position, chunk, n, first_id, CHUNK)
        tl.store(best + at, tl.max(most, 0))
    else:
        v = chunk * CHUNK + tl.arange(0, CHUNK)
        score = scores(row, t, seed, position, False, v, 0, n, first_id, CHUNK // 4)
        top = tl.max(score, 0)
        tl.store(best + at, top)
        tl.store(ids + at, tl.min(tl.where((score == top) & (score > float("-inf")), v, 0x7FFFFFFF), 0))


@triton.jit
def exact_best(row, t, seed, position, high, chunks, n, first_id, CHUNK: tl.constexpr):
    """Returns (the best exact score of a row, the lowest id that has it). high: of each of its chunks, what that is at most."""
    top = float("-inf")
    lowest = 0x7FFFFFFF
    i = tl.arange(0, high.shape[0])
    most_high = tl.max(high, 0)
    chunk = tl.min(tl.where(high == most_high, i, chunks - 1), 0)
    v, most = most_scores(row, t, seed, position, chunk, n, first_id, CHUNK)
    four = tl.min(tl.where(most == most_high, v, 0x7FFFFFFC), 0) // 4
    w = four * 4 + tl.arange(0, 4)
    bar = tl.max(scores(row, t, seed, position, True, w, four, n, first_id, 1), 0)
    least = bar - (SLACK + ROUNDING * tl.abs(bar))
    may_be = ((high >= least) | (high == most_high)) & (high > float("-inf"))
    chunk = tl.min(tl.where(may_be, i, chunks), 0)
    while chunk < chunks:
        v, most = most_scores(row, t, seed, position, chunk, n, first_id, CHUNK)
        may = ((most >= least) | (most == most_high)) & (most > float("-inf"))
        four = tl.min(tl.where(may, v, 0x7FFFFFFC), 0) // 4
        while four < 0x1FFFFFFF:
            w = four * 4 + tl.arange(0, 4)
            score = scores(row, t, seed, position, True, w, four, n, first_id, 1)
            m = tl.max(score, 0)
            if m > top:  # ascending, so a tie stays with the lower id
                top = m
                lowest = tl.min(tl.where(score == m, w, 0x7FFFFFFF), 0)
            four = tl.min(tl.where(may & (v >= four * 4 + 4), v, 0x7FFFFFFC), 0) // 4
        chunk = tl.min(tl.where(may_be & (i > chunk), i, chunks), 0)
    return top, lowest


@triton.jit
def best_of_row(
    logits,
    temperature,
    seeds,
    positions,
    greedy,
    best,
    ids,
    score,
    token,
    picked,
    n,
    chunks,
    stride,
    first_id,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Finds the best of a row's chunks, and stores its score, id and logit; the lowest id wins a tie."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, CHUNKS)
    row = logits + r * stride
    b = tl.load(best + r * chunks + i, mask=i < chunks, other=float("-inf"))
    if tl.load(greedy + r) == 0:
        t = tl.load(temperature + r)
        seed, position = tl.load(seeds + r), tl.load(positions + r)
        top, lowest = exact_best(row, t, seed, position, b, chunks, n, first_id, CHUNK)
    else:
        v = tl.load(ids + r * chunks + i, mask=i < chunks, other=0x7FFFFFFF)
        top = tl.max(b, 0)
        lowest = tl.min(tl.where(b == top, v, 0x7FFFFFFF), 0)
    found = lowest != 0x7FFFFFFF
    tl.store(score + r, top)
    tl.store(token + r, tl.where(found, first_id + lowest.to(tl.int64), -1))
    tl.store(picked + r, tl.load(row + lowest, mask=found, other=0.0))


def gumbel_argmax(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    greedy: torch.Tensor,
    first_id: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws a token a row of float32 logits [R, V]: -> (best score, id int64, its logit), each [R]."""
    rows, n = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    chunks = cdiv(n, CHUNK)
    best, ids = logits.new_empty(rows, chunks), logits.new_empty(rows, chunks, dtype=torch.int32)
    score, token, picked = logits.new_empty(rows), logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)
    if rows:
        given, how = (logits, temperature, seeds, positions, greedy), {"num_warps": 8, "enable_fp_fusion": False}
        where = logits.stride(0), first_id
        launch(best_of_chunk, (chunks, rows), *given, best, ids, n, *where, CHUNK, **how)
        drawn = (best, ids, score, token, picked)
        launch(best_of_row, (rows,), *given, *drawn, n, chunks, *where, next_power_of_2(chunks), CHUNK, **how)
    return score, token, picked


@triton.jit
def words_kernel(words, seed, position, n, FOURS: tl.constexpr):
    """Stores the random words of ids 0 .. n - 1 for one seed and position."""
    v = tl.program_id(0) * (4 * FOURS) + tl.arange(0, 4 * FOURS)
    seed = tl.full((), 0, tl.int64) + seed
    position = tl.full((), 0, tl.int64) + position
    tl.store(
        words + v, words_of(seed, position, tl.program_id(0) * FOURS, FOURS).to(tl.int32, bitcast=True), mask=v < n
    )


def noise_words(seed: int, position: int, ids: int, device: torch.device) -> torch.Tensor:
    """Returns the 32-bit words behind the noise of ids 0 .. ids, as int32 [ids]."""
    words = torch.empty(ids, dtype=torch.int32, device=device)
    launch(words_kernel, (cdiv(ids, 1024),), words, seed, position, ids, 256)
    return words
