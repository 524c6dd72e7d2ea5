"""GPU dispatch, without a word from the host: counts by blocks of tokens, then places, then copies of rows.

A block of `count_kernel` says how many of its tokens chose each expert. From all of these counts every block of `place_kernel`
finds where the rows of each expert begin and how many come before its own: a few kilobytes that stay in L2.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import fold
from kernels.gpu.launch import cdiv, launch, next_power_of_2
from kernels.gpu.overlap import early, previous_done
from kernels.gpu.workspace import counters
from kernels.ops.dispatch import Loose, Slots
from kernels.ops.route.portable import chosen_of, exponentials
from kernels.ops.route.portable import forward as route

SINGLY, LOOSE = 4, 256
"""Tokens up to which every choice is a block of its own; up to which rows of an expert stand as they come."""


@triton.jit
def choices(ids, t0, tokens, first, experts, R: tl.constexpr, K: tl.constexpr, W: tl.constexpr):
    """Returns int32 [R, W]: 1 where a token of the block chose one of this rank's experts."""
    token = t0 + tl.arange(0, R)
    expert = tl.arange(0, W)
    chosen = tl.zeros((R, W), tl.int32)
    for i in tl.static_range(K):
        e = tl.load(ids + token.to(tl.int64) * K + i, mask=token < tokens, other=-1) - first
        chosen += ((expert[None, :] == e[:, None]) & (expert < experts)[None, :]).to(tl.int32)
    return chosen


@triton.jit(do_not_specialize=["tokens", "first"])
def count_kernel(ids, counts, tokens, first, experts, R: tl.constexpr, K: tl.constexpr, W: tl.constexpr):
    """Counts how many of a block's R tokens chose each expert."""
    block = tl.program_id(0)
    chosen = choices(ids, block * R, tokens, first, experts, R, K, W)
    tl.store(counts + block * W + tl.arange(0, W), tl.sum(chosen, 0))


@triton.jit
def layout_of(total, ALIGN: tl.constexpr):
    """Computes (rows with their padding, first row) of each expert, from the number of its choices."""
    room = (total + ALIGN - 1) // ALIGN * ALIGN
    return room, tl.cumsum(room, 0) - room


@triton.jit
def write_layout(token, starts, block_expert, total, room, start, experts, block, W: tl.constexpr, ALIGN: tl.constexpr):
    """Writes where the experts begin, the rows that are nobody's, and the expert of each aligned block."""
    expert = tl.arange(0, W)
    mine = expert < experts
    if block == 0:
        tl.store(starts + expert, start, mask=mine)
        tl.store(starts + experts, tl.sum(room, 0))
        for j in range(0, ALIGN, 16):
            pad = total[:, None] + j + tl.arange(0, 16)[None, :]
            tl.store(token + start[:, None] + pad, -1, mask=pad < room[:, None])
    used = tl.sum(room, 0) // ALIGN
    for a0 in range(block * 64, used, tl.num_programs(0) * 64):
        a = a0 + tl.arange(0, 64)
        before = mine[None, :] & ((start + room)[None, :] <= a[:, None] * ALIGN)
        tl.store(block_expert + a, tl.sum(before.to(tl.int32), 1), mask=a < used)


@triton.jit(do_not_specialize=["tokens", "first", "blocks"])
def place_kernel(
    ids,
    counts,
    of,
    token,
    starts,
    block_expert,
    tokens,
    first,
    experts,
    blocks,
    R: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Gives each choice of a block its row, and writes where experts begin and which rows are padding."""
    block = tl.program_id(0)
    expert = tl.arange(0, W)
    chosen = choices(ids, block * R, tokens, first, experts, R, K, W)
    total = tl.zeros((W,), tl.int32)
    before = tl.zeros((W,), tl.int32)
    for b0 in range(0, blocks, CHUNK):
        b = b0 + tl.arange(0, CHUNK)
        n = tl.load(counts + b[:, None] * W + expert[None, :], mask=(b < blocks)[:, None], other=0)
        total += tl.sum(n, 0)
        before += tl.sum(tl.where((b < block)[:, None], n, 0), 0)
    room, start = layout_of(total, ALIGN)
    row = (start + before)[None, :] + tl.cumsum(chosen, 0) - chosen
    t = block * R + tl.arange(0, R)
    below = tl.zeros((R,), tl.int32)
    for i in tl.static_range(K):  # ids ascend: a choice stands behind those of the ranks before
        at = t.to(tl.int64) * K + i
        e = tl.load(ids + at, mask=t < tokens, other=1 << 30) - first
        below += (e < 0).to(tl.int32)
        tl.store(of + at, -1, mask=(t < tokens) & ((e < 0) | (e >= experts)))
    to = of + t.to(tl.int64)[:, None] * K + below[:, None] + tl.cumsum(chosen, 1) - 1
    tl.store(to, row, mask=chosen > 0)
    tl.store(token + row, tl.broadcast_to(t[:, None], (R, W)), mask=chosen > 0)
    write_layout(token, starts, block_expert, total, room, start, experts, block, W, ALIGN)


@early
@triton.jit(do_not_specialize=["tokens", "first"])
def route_and_place_kernel(
    logits,
    ids,
    weights,
    of,
    token,
    counts,
    arrived,
    block_expert,
    tokens,
    width,
    first,
    experts,
    stride,
    K: tl.constexpr,
    W: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALL: tl.constexpr,
    EACH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Routes one token: its choices, and a row for each, the next one of its expert; or, with EACH, rows of its own. `width`:
    experts in all. `arrived`: how many tokens have come, then how many chose each expert; the last token to come moves these to
    `counts` and leaves zeros."""
    previous_done()
    t = tl.program_id(0) + tl.arange(0, 1)
    every = tl.arange(0, W)
    rank, e = exponentials(logits, t, every, tokens, width)
    chosen = chosen_of(rank, every, width, K, ALL)
    total = fold(tl.where(chosen > 0, e, 0.0) if NORMALIZE else e)
    share = tl.div_rn(e, tl.broadcast_to(total[:, None], (1, W)))
    at = t[:, None] * K + tl.cumsum(chosen, 1) - 1
    expert = tl.broadcast_to(every[None, :], (1, W))
    tl.store(ids + at, expert, mask=chosen > 0)
    tl.store(weights + at, share, mask=chosen > 0)
    local = expert - first
    mine = (chosen > 0) & (local >= 0) & (local < experts)
    if EACH:
        row = at * ALIGN
        tl.store(block_expert + at, tl.where(mine, local, -1), mask=chosen > 0)
    else:
        row = local * stride + tl.atomic_add(arrived + 1 + local, 1, mask=mine, sem="relaxed")
        tl.store(token + row, tl.broadcast_to(t[:, None], (1, W)), mask=mine)
    tl.store(of + at, tl.where(mine, row, -1), mask=chosen > 0)
    if not EACH:
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel") == tokens - 1:
            tl.debug_barrier()
            tl.store(
                counts + every,
                tl.load(arrived + 1 + every, mask=every < experts, cache_modifier=".cg"),
                mask=every < experts,
            )
            tl.store(arrived + 1 + every, 0, mask=every < experts)
            tl.store(arrived, 0)


@triton.jit(do_not_specialize=["leaves"])
def bounds_kernel(token, starts, bounds, groups, leaves, G: tl.constexpr):
    """Counts the rows of expert e whose token is below each group's offset: a binary search, as tokens ascend; those after
    the last are nobody's, -1, and so are compared as they would stand after all tokens."""
    e = tl.program_id(0)
    g = tl.arange(0, G)
    offset = tl.load(groups + g, mask=g <= leaves, other=0)
    low = tl.zeros((G,), tl.int32) + tl.load(starts + e)
    high = tl.zeros((G,), tl.int32) + tl.load(starts + e + 1)
    while tl.max((low < high).to(tl.int32), 0) > 0:
        middle = (low + high) // 2
        open = low < high
        found = tl.load(token + middle, mask=open, other=-1)
        less = (found >= 0) & (found < offset)
        high = tl.where(open & (less == 0), middle, high)
        low = tl.where(open & less, middle + 1, low)
    tl.store(bounds + e.to(tl.int64) * (leaves + 1) + g, low.to(tl.int64), mask=g <= leaves)


@triton.jit
def gather_kernel(x, rows, of, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """Copies a token's row to the rows of its choices."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + t * n + i, mask=i < n)
    for c in tl.static_range(K):
        row = tl.load(of + t * K + c).to(tl.int64)
        tl.store(rows + row * n + i, v, mask=(i < n) & (row >= 0))


@triton.jit
def gather_backward_kernel(d_rows, d_x, of, n, K: tl.constexpr, BLOCK: tl.constexpr):
    """Sums the rows of a token's choices, in their order, in float32."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for c in tl.static_range(K):
        row = tl.load(of + t * K + c).to(tl.int64)
        there = (i < n) & (row >= 0)
        total += tl.load(d_rows + row * n + i, mask=there, other=0.0).to(tl.float32)
    tl.store(d_x + t * n + i, total.to(d_x.dtype.element_ty), mask=i < n)


def _made(ids: torch.Tensor, groups: torch.Tensor, first: int, experts: int, align: int, capacity: int) -> Slots:
    leaves = groups.numel() - 1
    return Slots(
        torch.empty_like(ids),
        ids.new_empty(capacity),
        ids.new_empty(experts + 1),
        groups.new_empty(experts, leaves + 1),
        ids.new_empty(capacity // align),
        align,
        first,
        experts,
    )


def dispatch(ids: torch.Tensor, first: int, experts: int, align: int, groups: torch.Tensor, capacity: int) -> Slots:
    """Gives each choice ids [T, k] of experts first .. first + experts - 1 a row, by expert and then token; aligns each
    expert."""
    tokens, k = ids.shape
    W, R = next_power_of_2(experts), 16 if tokens <= 256 else 32
    blocks = max(1, cdiv(tokens, R))
    counts = ids.new_empty(blocks, W)
    made = _made(ids, groups, first, experts, align, capacity)
    launch(count_kernel, (blocks,), ids, counts, tokens, first, experts, R, k, W, num_warps=4)
    given = (ids, counts, made.of, made.token, made.starts, made.block_expert, tokens, first, experts, blocks)
    launch(place_kernel, (blocks,), *given, R, k, W, align, min(64, next_power_of_2(blocks)), num_warps=4)
    if torch.is_grad_enabled():
        leaves = groups.numel() - 1
        of = (made.token, made.starts, made.bounds, groups, leaves, next_power_of_2(leaves + 1))
        launch(bounds_kernel, (experts,), *of, num_warps=1)
    return made


def route_and_dispatch(
    logits: torch.Tensor, k: int, normalize: bool, first: int, experts: int, align: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, Slots]:
    """Routes logits [T, E] and dispatches the choices, in one launch for few tokens, whose rows may lie with gaps."""
    tokens, width = logits.shape
    nothing = torch.empty(1, dtype=torch.int64, device=logits.device)
    if not 0 < tokens <= LOOSE:
        ids, weights = route(logits, k, normalize)
        return ids, weights, dispatch(ids, first, experts, align, nothing, capacity)
    ids, weights = logits.new_empty(tokens, k, dtype=torch.int32), logits.new_empty(tokens, k)
    if tokens <= SINGLY:
        made, rows = Loose(each=k), tokens * k * align
    else:
        stride = cdiv(tokens, align) * align
        made, rows = Loose(stride, ids.new_empty(experts)), experts * stride
    counts = ids if made.counts is None else made.counts
    of, token, block_expert = torch.empty_like(ids), ids.new_empty(rows), ids.new_empty(tokens * k)
    arrived = counters(ids.device, 1 + experts)
    given = (logits, ids, weights, of, token, counts, arrived, block_expert, tokens, width, first, experts, made.stride)
    shape = (k, next_power_of_2(width), normalize, k == width, made.each > 0, align)
    launch(route_and_place_kernel, (tokens,), *given, *shape, num_warps=1, enable_fp_fusion=False)
    return ids, weights, Slots(of, token, nothing, nothing, block_expert, align, first, experts, made)


def gather(x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Copies the rows of x [T, N] to their slots [capacity, N]; a row that is nobody's is not written."""
    (tokens, k), n = slots.of.shape, x.shape[1]
    rows = x.new_empty(slots.capacity, n)
    if tokens:
        launch(gather_kernel, (tokens, cdiv(n, 2048)), x, rows, slots.of, n, k, 2048, num_warps=4)
    return rows


def gather_backward(d_rows: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Sums the rows of each token's choices, in their order, in float32: [capacity, N] -> [T, N]."""
    (tokens, k), n = slots.of.shape, d_rows.shape[1]
    d_x = d_rows.new_empty(tokens, n)
    if tokens:
        grid = (tokens, cdiv(n, 1024))
        launch(gather_backward_kernel, grid, d_rows, d_x, slots.of, n, k, 1024, num_warps=4, enable_fp_fusion=False)
    return d_x
