"""A sum over tokens (dW): y = a^T b, with one leaf for each group of sequences, at offsets that may be anything.

The ring and the tree of ring.py over operands whose token index is not contiguous. Stages are 64 tokens from a group's start;
the last one, where the group ends inside it, is read from a copy that is padded with zeros (`copy_tails`), so that a stage
never holds a token of the next group. More than eight groups go by eights: the root of a set is a node of level 3, and levels 3
and above of the binary counter wait in a scratch tile that stays in L2.

With `experts` the rows of each lie together and have groups of their own: as many sums, one after the other in y. Their tiles
are short, so that the way of a tile to memory counts: it leaves by TMA, through shared memory, while the next one is computed.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from kernels.gpu.card import card_of
from kernels.gpu.dialect import reinterpret, store_boxes
from kernels.gpu.hopper.pace import PERIOD, in_step, leave
from kernels.gpu.hopper.ring import (
    BK,
    accumulator,
    advance,
    allocate,
    bound,
    copy,
    descriptor,
    flat,
    idle,
    park,
    reserve,
    stages,
    subtree,
    tile_of,
    tile_origin,
)
from kernels.gpu.launch import cdiv, next_power_of_2, tile_boxes
from kernels.gpu.launch import launch as run
from kernels.gpu.workspace import counters

WIDE = 128 * 256 * 128
"""Elements of y from which tiles of 128 x 256 keep the multiprocessors busy."""


class Groups(NamedTuple):
    """Bounds the leaves: leaf j are the tokens bounds[j] .. bounds[j + 1] - 1; `sets` of leaves are finished one after the
    other."""

    bounds: Any  # int64 [leaves + 1]; of each expert
    leaves: Any
    sets: Any
    levels: Any  # of the binary counter over sets
    experts: Any  # sums, each with bounds of its own


@gluon.jit
def part_of(tile, tiles, groups, EXPERTS: gl.constexpr):
    """Returns (expert, its tile, its bounds)."""
    if EXPERTS:
        e = tile // tiles
        return e, tile - e * tiles, groups.bounds + e * (groups.leaves + 1)
    else:
        return 0, tile, groups.bounds


@triton.jit
def copy_tail(t, to, row, first, rest, width, stride, to_stride, column):
    """Copies a group's last tokens of some columns into its padded stage, with zeros past their end."""
    inside = (row < rest)[:, None] & (column < width)[None, :]
    v = tl.load(t + (first + row)[:, None] * stride + column[None, :], mask=inside, other=0.0)
    tl.store(to + row.to(tl.int64)[:, None] * to_stride + column[None, :], v, mask=(column < width)[None, :])


@triton.jit
def copy_tails(
    a, b, a_tails, b_tails, bounds, leaves, M, N, a_stride, b_stride, am, bn, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Fills tails [groups * ROWS, M] and [groups * ROWS, N]: the last extent % ROWS tokens of a group, then zeros. Where a
    group ends with a whole stage nothing is written, and nothing will be read. Of each expert `leaves` groups, with a bound
    more."""
    group = tl.program_id(0).to(tl.int64)
    bound = bounds + group // leaves * (leaves + 1) + group % leaves
    last = tl.load(bound + 1)
    rest = (last - tl.load(bound)) % ROWS
    if rest > 0:
        row = tl.arange(0, ROWS)
        block = tl.program_id(1)
        blocks_a = tl.cdiv(M, COLUMNS)
        if block < blocks_a:
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            copy_tail(a, a_tails + group * ROWS * am, row, last - rest, rest, M, a_stride, am, column)
        else:
            column = (block - blocks_a) * COLUMNS + tl.arange(0, COLUMNS)
            copy_tail(b, b_tails + group * ROWS * bn, row, last - rest, rest, N, b_stride, bn, column)


@gluon.jit
def producer(
    ring,
    ad,
    bd,
    a_tails,
    b_tails,
    pace,
    groups,
    M,
    N,
    GROUP: gl.constexpr,
    L: gl.constexpr,
    EVERY: gl.constexpr,
    EXPERTS: gl.constexpr,
):
    """Fills the ring with the stages of each group for each of the block's tiles."""
    rows = gl.cdiv(M, 128)
    columns = gl.cdiv(N, ring.BN)
    stage = 0
    phase = 1
    tiles = rows * columns * groups.experts
    blocks = gl.num_programs(0)
    since = 0
    target = 0
    patient = tiles > blocks
    for tile in range(gl.program_id(0), tiles, blocks):
        expert, inner, bounds = part_of(tile, rows * columns, groups, EXPERTS)
        row, column = tile_origin(inner, rows, columns, GROUP)
        m0 = row * 128
        n0 = column * ring.BN
        everyone = tile - gl.program_id(0) + blocks <= tiles
        first = bound(bounds, 0, groups.leaves)
        last = bound(bounds, 1, groups.leaves)
        for j in range(groups.sets * L):
            after = bound(bounds, j + 2, groups.leaves)  # arrives while this leaf is filled
            # an empty leaf is zeros: TMA gives them past the last tail
            tail = gl.where(first < last, expert * groups.leaves + j, groups.experts * groups.leaves) * 64
            end = gl.maximum(last, first + 1)
            more = gl.cdiv(end - first, 64)
            since, target, patient = in_step(pace, everyone, more, since, target, patient, EVERY)
            for k in range(first, end, 64):
                reserve(ring, stage, phase)
                if k + 64 <= last:
                    copy(ring, ad, bd, m0, n0, k, k, stage)
                else:
                    copy(ring, a_tails, b_tails, m0, n0, tail, tail, stage)
                stage, phase = advance(stage, phase, ring.STAGES)
            first = last
            last = after
    leave(pace)


@gluon.jit
def outlets(yd, parked, L: gl.constexpr, OUT: gl.constexpr, BUFFERS: gl.constexpr):
    """Returns room for BUFFERS parts of a tile, OUT columns each, on their way to memory: that of what is parked, if any is."""
    if OUT == 0:
        return parked
    elif L == 8:
        return reinterpret(parked, gl.float32, [BUFFERS, 64, OUT], yd.layout)
    else:
        return gl.allocate_shared_memory(gl.float32, [BUFFERS, 64, OUT], yd.layout)


@gluon.jit
def send(v, out, yd, row, column, PART: gl.constexpr, OUT: gl.constexpr, BUFFERS: gl.constexpr):
    """Stores float32 [64, W] by TMA in parts of OUT columns, of which `v` begins with number PART; the last ones run on."""
    W: gl.constexpr = v.shape[1]
    if W > OUT:
        left, right = gl.split(gl.permute(gl.reshape(v, [64, 2, W // 2]), [0, 2, 1]))
        send(left, out, yd, row, column, PART, OUT, BUFFERS)
        send(right, out, yd, row, column + W // 2, PART + W // 2 // OUT, OUT, BUFFERS)
    else:
        tma.store_wait(BUFFERS - 1)
        out.index(PART % BUFFERS).store(v)
        fence_async_shared()
        store_boxes(yd, [row, column], out.index(PART % BUFFERS))


@gluon.jit
def store_tile(v, y, expert, row, column, M, N, EXPERTS: gl.constexpr):
    """Stores float32 [64, W] from registers, of an expert's y where there are EXPERTS."""
    BN: gl.constexpr = v.shape[1]
    ACC: gl.constexpr = accumulator(BN)
    r = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, ACC)), 1)
    c = gl.expand_dims(gl.arange(0, BN, gl.SliceLayout(0, ACC)), 0)
    inside = (row + r < M) & (column + c < N)
    at = (row + r).to(gl.int64) * N + column + c
    if EXPERTS:
        at += expert.to(gl.int64) * M * N
    gl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@gluon.jit
def consumer(
    ring,
    a,
    parked,
    out,
    yd,
    y,
    scratch,
    groups,
    M,
    N,
    ROW: gl.constexpr,
    GROUP: gl.constexpr,
    L: gl.constexpr,
    MORE: gl.constexpr,
    EXPERTS: gl.constexpr,
    OUT: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Computes with one warpgroup: rows ROW .. ROW + 63 of every tile of this block. MORE: than one set of leaves."""
    BN: gl.constexpr = ring.BN
    ACC: gl.constexpr = accumulator(BN)
    rows = gl.cdiv(M, 128)
    columns = gl.cdiv(N, BN)
    size: gl.constexpr = 64 * BN
    parked_sets = scratch + (gl.program_id(0) * 2 + ROW // 64).to(gl.int64) * (groups.levels * size)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), rows * columns * groups.experts, gl.num_programs(0)):
        expert, inner, bounds = part_of(tile, rows * columns, groups, EXPERTS)
        row, column = tile_origin(inner, rows, columns, GROUP)
        if MORE:
            v = gl.zeros([64, BN], gl.float32, ACC)
            for i in range(groups.sets):
                v, stage, phase = subtree(ring, a, parked, stage, phase, 0, bounds, i * L, groups.leaves, L, True)
                node = flat(v)
                mine = parked_sets + gl.arange(0, size, node.type.layout)
                level = 0
                n = i
                while n % 2 == 1:
                    node = gl.load(mine + level * size) + node
                    level += 1
                    n = n // 2
                if i + 1 < groups.sets:
                    gl.store(mine + level * size, node)
                else:  # a count that is no power of two leaves finished subtrees on the left: add them from the right
                    up = level + 1
                    while (groups.sets >> up) > 0:
                        if (groups.sets >> up) % 2 == 1:
                            node = gl.load(mine + up * size) + node
                        up += 1
                v = tile_of(node, BN, ACC)
        else:
            v, stage, phase = subtree(ring, a, parked, stage, phase, 0, bounds, 0, groups.leaves, L, True)
        if OUT:
            send(v, out, yd, expert * M + row * 128 + ROW, column * BN, 0, OUT, BUFFERS)
        else:
            store_tile(v, y, expert, row * 128 + ROW, column * BN, M, N, EXPERTS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "leaves", "sets", "levels", "experts"])
def grouped_kernel(
    ad,
    bd,
    a_tails,
    b_tails,
    yd,
    y,
    scratch,
    pace,
    M,
    N,
    bounds,
    leaves,
    sets,
    levels,
    experts,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    L: gl.constexpr,
    MORE: gl.constexpr,
    EVERY: gl.constexpr,
    EXPERTS: gl.constexpr,
    OUT: gl.constexpr,
    BUFFERS: gl.constexpr,
):
    """Computes all tiles of a^T b, summed over tokens group by group and up the tree."""
    groups = Groups(bounds, leaves, sets, levels, experts)
    ring = allocate(ad, bd, BN, STAGES, True, True)
    park0 = park(ring, L)
    park1 = park(ring, L)
    o0 = outlets(yd, park0, L, OUT, BUFFERS)
    o1 = outlets(yd, park1, L, OUT, BUFFERS)
    gl.warp_specialize(
        [
            (
                consumer,
                (ring, ring.a0, park0, o0, yd, y, scratch, groups, M, N, 0, GROUP, L, MORE, EXPERTS, OUT, BUFFERS),
            ),
            (
                consumer,
                (ring, ring.a1, park1, o1, yd, y, scratch, groups, M, N, 64, GROUP, L, MORE, EXPERTS, OUT, BUFFERS),
            ),
            (producer, (ring, ad, bd, a_tails, b_tails, pace, groups, M, N, GROUP, L, EVERY, EXPERTS)),
            (idle, ()),
            (idle, ()),
            (idle, ()),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )


def _tails(a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fills the padded stages of all leaves, as TMA reads them."""

    def room(t: torch.Tensor) -> torch.Tensor:
        width = t.shape[1]
        made = t.new_empty(groups * BK, cdiv(width, 8) * 8)
        return made if width % 8 == 0 else made[:, :width]

    leaves, M, N = bounds.shape[-1] - 1, a.shape[1], b.shape[1]
    groups = bounds.numel() // (leaves + 1) * leaves
    made = room(a), room(b)
    strides = [t.stride(0) for t in (a, b, *made)]
    grid = (groups, cdiv(M, 128) + cdiv(N, 128))
    run(copy_tails, grid, a, b, *made, bounds, leaves, M, N, *strides, BK, 128, num_warps=4)
    return made


def _outlet(y: torch.Tensor, M: int, experts: bool, L: int, BN: int) -> tuple[int, int]:
    """Chooses how a tile leaves: (columns of a part, parts at once), or from registers, (0, 1), where no tile of TMA's is a
    tile of one expert, or where tiles are long and the room is better spent on stages."""
    if not experts or M % 128 or y.dtype != torch.float32 or not reachable_rows(y):
        return 0, 1
    return (64, 2) if L == 8 else (64, 1)


def reachable_rows(y: torch.Tensor) -> bool:
    """Says whether TMA can write rows of `y`, float32."""
    return y.is_contiguous() and y.shape[1] % 4 == 0 and y.data_ptr() % 16 == 0


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    bounds: torch.Tensor,
    y: torch.Tensor,
    *,
    BN: int | None = None,
    group: int = 8,
    most: int = 8,
    depth: int | None = None,
    blocks: int | None = None,
    period: int = PERIOD,
    out: tuple[int, int] | None = None,
) -> None:
    """Computes y = a^T b, one leaf a group: a [T, M], b [T, N] bf16, bounds int64 [leaves + 1] on the device -> y [M, N]
    (float32, or rounded once); or bounds [experts, leaves + 1] -> y [experts * M, N]. `out`: columns of a part of a tile that
    leaves by TMA, and how many do at once; (0, 1): from registers."""
    M, N = a.shape[1], b.shape[1]
    rows = cdiv(M, 128)
    experts, leaves = (bounds.shape[0] if bounds.dim() == 2 else 1), bounds.shape[-1] - 1
    # Of one leaf no node waits: registers for a wider tile
    BN = BN or (256 if leaves == 1 and experts * M * N >= WIDE else 128)
    card = card_of(a.device)
    grid = (min(blocks or card.multiprocessors, experts * rows * cdiv(N, BN)),)
    L = min(most, next_power_of_2(leaves))
    sets = cdiv(leaves, L)
    OUT, BUFFERS = out or _outlet(y, M, bounds.dim() == 2, L, BN)
    room = 0 if L == 8 else 2 * 64 * 4 * OUT * BUFFERS
    levels = sets.bit_length()
    scratch = y.new_empty(grid[0] * 2 * levels * 64 * BN if sets > 1 else 1, dtype=torch.float32)
    a_tails, b_tails = _tails(a, b, bounds)
    run(
        grouped_kernel,
        grid,
        descriptor(a, 64, True),
        descriptor(b, BN, True),
        descriptor(a_tails, 64, True),
        descriptor(b_tails, BN, True),
        tile_boxes(y, 64, OUT) if OUT else y,
        y,
        scratch,
        counters(a.device, 2),
        M,
        N,
        bounds,
        leaves,
        sets,
        levels,
        experts,
        BN,
        depth or min(6, stages(card.shared_memory - room, L, BN, False)),
        group,
        L,
        sets > 1,
        period,
        bounds.dim() == 2,
        OUT,
        BUFFERS,
        num_warps=4,
    )
