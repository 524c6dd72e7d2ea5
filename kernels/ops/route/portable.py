"""GPU router: the operations of cpu.c one by one, so the bits are the CPU's. A row of experts is a row of a tile."""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import exp_f32, fold
from kernels.gpu.launch import cdiv, launch, next_power_of_2


@triton.jit
def exponentials(logits, row, expert, rows, experts):
    """Returns (what is compared, e^(logit - max)) [R, W]: a logit that is no number counts as infinity; 0 past the last
    expert."""
    inside = (row < rows)[:, None] & (expert < experts)[None, :]
    x = tl.load(logits + row[:, None].to(tl.int64) * experts + expert[None, :], mask=inside, other=float("-inf"))
    rank = tl.where(x == x, x, float("inf"))
    return rank, tl.where((expert < experts)[None, :], exp_f32(x - tl.max(rank, 1)[:, None]), 0.0)


@triton.jit
def chosen_of(rank, expert, experts, K: tl.constexpr, ALL: tl.constexpr):
    """Returns int32 [R, W]: 1 for the K largest of each row, a tie going to the lower id. `ALL`: K is the number of experts."""
    free = (expert < experts)[None, :] & (rank == rank)
    for _ in tl.static_range(0 if ALL else K):
        best = tl.max(tl.where(free, rank, float("-inf")), 1)
        first = tl.min(tl.where(free & (rank == best[:, None]), expert[None, :], 1 << 30), 1)
        free = free & (expert[None, :] != first[:, None])
    return ((expert < experts)[None, :] & (ALL | (free == 0))).to(tl.int32)


@triton.jit
def route_kernel(
    logits,
    ids,
    weights,
    rows,
    experts,
    K: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALL: tl.constexpr,
):
    """Chooses the experts of R tokens and computes their weights."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    expert = tl.arange(0, W)
    rank, e = exponentials(logits, row, expert, rows, experts)
    chosen = chosen_of(rank, expert, experts, K, ALL)
    total = fold(tl.where(chosen > 0, e, 0.0) if NORMALIZE else e)
    share = tl.div_rn(e, tl.broadcast_to(total[:, None], (R, W)))
    at = row[:, None].to(tl.int64) * K + tl.cumsum(chosen, 1) - 1
    there = (chosen > 0) & (row < rows)[:, None]
    tl.store(ids + at, tl.broadcast_to(expert[None, :], (R, W)), mask=there)
    tl.store(weights + at, share, mask=there)


@triton.jit
def backward_kernel(
    logits,
    ids,
    weights,
    d_weights,
    d_logits,
    rows,
    experts,
    K: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALL: tl.constexpr,
):
    """Computes the gradient to the logits of R tokens."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    expert = tl.arange(0, W)
    there = (row < rows)[:, None]
    share = tl.zeros((R, W), tl.float32)
    g = tl.zeros((R, W), tl.float32)
    if ALL:
        every = row[:, None].to(tl.int64) * K + expert[None, :]
        g = tl.load(d_weights + every, mask=there & (expert < experts)[None, :], other=0.0)
        if NORMALIZE:
            share = tl.load(weights + every, mask=there & (expert < experts)[None, :], other=0.0)
    for i in tl.static_range(0 if ALL else K):
        at = row.to(tl.int64) * K + i
        own = expert[None, :] == tl.load(ids + at, mask=row < rows, other=-1)[:, None]
        g = tl.where(own, tl.load(d_weights + at, mask=row < rows, other=0.0)[:, None], g)
        if NORMALIZE:
            share = tl.where(own, tl.load(weights + at, mask=row < rows, other=0.0)[:, None], share)
    if not NORMALIZE:
        _, e = exponentials(logits, row, expert, rows, experts)
        share = tl.div_rn(e, tl.broadcast_to(fold(e)[:, None], (R, W)))
    d = share * (g - fold(share * g)[:, None])
    to = d_logits + row[:, None].to(tl.int64) * experts + expert[None, :]
    tl.store(to, d, mask=there & (expert < experts)[None, :])


def _rows(rows: int, W: int) -> int:
    """Tokens of a block: few where there are few, so that more multiprocessors take part."""
    return max(1, min(4096 // W, 1 if rows <= 256 else 16))


def forward(logits: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the k largest logits of each row [T, E] and weighs them by softmax, `normalize`d or not: -> ids int32 and
    weights float32 [T, k]."""
    rows, experts = logits.shape
    W = next_power_of_2(experts)
    R = _rows(rows, W)
    ids, weights = logits.new_empty(rows, k, dtype=torch.int32), logits.new_empty(rows, k)
    if rows:
        given = (logits, ids, weights, rows, experts, k, W, R, normalize, k == experts)
        launch(route_kernel, (cdiv(rows, R),), *given, num_warps=1 if R == 1 else 4, enable_fp_fusion=False)
    return ids, weights


def backward(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, d_weights: torch.Tensor, normalize: bool
) -> torch.Tensor:
    """Computes the gradient to the logits, float32 [T, E], from that to the weights."""
    rows, experts = logits.shape
    W = next_power_of_2(experts)
    R = _rows(rows, W)
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if rows:
        k = ids.shape[1]
        given = (
            logits.contiguous(),
            ids,
            weights,
            d_weights,
            d_logits,
            rows,
            experts,
            k,
            W,
            R,
            normalize,
            k == experts,
        )
        launch(backward_kernel, (cdiv(rows, R),), *given, num_warps=1 if R == 1 else 4, enable_fp_fusion=False)
    return d_logits
