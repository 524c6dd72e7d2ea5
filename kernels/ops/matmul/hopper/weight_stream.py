"""Few rows to some hundred (decoding, small prefills): y = x w^T on the tree, bound by the bytes of w.

The ring of ring.py with the operands swapped: a stage is 64 or 128 rows of w (one warpgroup for each 64) by 64, and
BN tokens by 64; a block runs through its items without letting the ring drain. An item is a tile, or, of the tiles from
`whole` on, one subtree of its leaves (1 / SPLIT of them), merged in registers: so the last wave of tiles can be shared by
all blocks. Subtree roots are parked in global memory; the warpgroup that arrives last at a tile adds them in tree order,
whatever the order of arrival was. It loads a chunk of all of them before it adds the first: one wait, not one for each.
"""

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.gpu.card import card_of
from kernels.gpu.dialect import thread_barrier
from kernels.gpu.hopper.ring import STAGE_BYTES, allocate, descriptor, fill, idle, leaf
from kernels.gpu.launch import cdiv
from kernels.gpu.launch import launch as run
from kernels.gpu.overlap import all_previous_done, bring_rows_near, early
from kernels.gpu.workspace import counters


class Items(NamedTuple):
    """Describes the items: one is a tile of y^T [N, M], or of those from `whole` on one of SPLIT parts of its leaves."""

    count: Any
    whole: Any
    columns: Any  # tiles of tokens
    M: Any
    N: Any
    extent: Any  # of a leaf


@gluon.jit
def place(item, items, SPLIT: gl.constexpr):
    """Returns (tile, part or -1)"""
    past = item - items.whole
    return gl.where(past < 0, item, items.whole + past // SPLIT), gl.where(past < 0, -1, past % SPLIT)


@gluon.jit
def near(ring, w, ldw, items, LEAVES: gl.constexpr, SPLIT: gl.constexpr, HALVES: gl.constexpr):
    """Brings near what of w fills the ring first, while the kernel before runs."""
    tile, part = place(gl.program_id(0), items, SPLIT)
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    n0 = tile // items.columns * (64 * HALVES)
    first = gl.maximum(part, 0) * (LEAVES // SPLIT) * items.extent
    steps = gl.minimum(ring.STAGES * ring.BK, gl.where(part < 0, LEAVES, LEAVES // SPLIT) * items.extent)
    for i in gl.static_range(2 * HALVES):
        n = gl.minimum(n0 + i * 32 + lane, items.N - 1)
        bring_rows_near(w + n.to(gl.int64) * ldw + first, 0 * lane + STAGE_BYTES // ring.BK * steps)


@gluon.jit
def producer(ring, wd, xd, items, LEAVES: gl.constexpr, SPLIT: gl.constexpr, HALVES: gl.constexpr):
    """Fills the ring with the stages of each of the block's items, without letting it drain between them."""
    all_previous_done()
    stage = 0
    phase = 1
    for item in range(gl.program_id(0), items.count, gl.num_programs(0)):
        tile, part = place(item, items, SPLIT)
        n0 = tile // items.columns * (64 * HALVES)
        m0 = tile % items.columns * ring.BN
        first = gl.maximum(part, 0) * (LEAVES // SPLIT)
        for j in range(gl.where(part < 0, LEAVES, LEAVES // SPLIT)):
            k = (first + j) * items.extent
            stage, phase = fill(ring, wd, xd, n0, m0, k, k, items.extent, stage, phase, HALVES)


@gluon.jit
def close(v, level0, level1, level2, J: gl.constexpr):
    """Adds v, leaf J, to as many finished levels as J has trailing one bits; returns (v, the levels)."""
    if J % 2 == 0:
        level0 = v
    else:
        v = level0 + v
        if J % 4 == 1:
            level1 = v
        else:
            v = level1 + v
            if J == 3:
                level2 = v
            else:
                v = level2 + v
    return v, level0, level1, level2


@gluon.jit
def merged(ring, w, stage, phase, extent, LEAVES: gl.constexpr):
    """Returns the root of LEAVES leaves."""
    v, stage, phase = leaf(ring, w, stage, phase, extent)
    level0 = v
    level1 = v
    level2 = v
    for j in gl.static_range(1, LEAVES):
        v, stage, phase = leaf(ring, w, stage, phase, extent)
        v, level0, level1, level2 = close(v, level0, level1, level2, j)
    return v, stage, phase


@gluon.jit
def store_tile(v, y, items, n0, m0):
    """Stores the root v of a tile of y^T."""
    BN: gl.constexpr = v.shape[1]
    n = n0 + gl.arange(0, 64, gl.SliceLayout(1, v.type.layout))
    m = m0 + gl.arange(0, BN, gl.SliceLayout(0, v.type.layout))
    to = gl.expand_dims(m.to(gl.int64) * items.N, 0) + gl.expand_dims(n, 1)
    inside = gl.expand_dims(m < items.M, 0) & gl.expand_dims(n < items.N, 1)
    gl.store(y + to, v.to(y.dtype.element_ty), mask=inside)


@gluon.jit
def park_part(v, y, nodes, counter, items, n0, m0, part, SPLIT: gl.constexpr):
    """Parks v, the root of a part, in nodes [SPLIT, BN, 64]. The last to arrive adds them all."""
    BN: gl.constexpr = v.shape[1]
    step: gl.constexpr = BN * 64
    n = gl.arange(0, 64, gl.SliceLayout(1, v.type.layout))
    m = gl.arange(0, BN, gl.SliceLayout(0, v.type.layout))
    gl.store(nodes + part * step + gl.expand_dims(m * 64, 0) + gl.expand_dims(n, 1), v, cache_modifier=".cg")
    thread_barrier()
    if gl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
        thread_barrier()
        FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
        CHUNK: gl.constexpr = BN if BN * SPLIT <= 128 else (128 // SPLIT)
        cm = gl.arange(0, CHUNK, gl.SliceLayout(1, FLAT))
        cn = gl.arange(0, 64, gl.SliceLayout(0, FLAT))
        for c in gl.static_range(BN // CHUNK):
            at = nodes + gl.expand_dims((c * CHUNK + cm) * 64, 1) + gl.expand_dims(cn, 0)
            r0 = gl.load(at, cache_modifier=".cg")
            r1 = gl.load(at + step, cache_modifier=".cg")
            if SPLIT >= 4:
                r2 = gl.load(at + 2 * step, cache_modifier=".cg")
                r3 = gl.load(at + 3 * step, cache_modifier=".cg")
            if SPLIT == 8:
                r4 = gl.load(at + 4 * step, cache_modifier=".cg")
                r5 = gl.load(at + 5 * step, cache_modifier=".cg")
                r6 = gl.load(at + 6 * step, cache_modifier=".cg")
                r7 = gl.load(at + 7 * step, cache_modifier=".cg")
            root = r0 + r1
            if SPLIT >= 4:
                root = root + (r2 + r3)
            if SPLIT == 8:
                root = root + ((r4 + r5) + (r6 + r7))
            to = gl.expand_dims((m0 + c * CHUNK + cm).to(gl.int64) * items.N, 1) + gl.expand_dims(n0 + cn, 0)
            inside = gl.expand_dims(m0 + c * CHUNK + cm < items.M, 1) & gl.expand_dims(n0 + cn < items.N, 0)
            gl.store(y + to, root.to(y.dtype.element_ty), mask=inside)
        gl.store(counter, 0)


@gluon.jit
def consumer(
    ring,
    w,
    y,
    nodes,
    arrived,
    items,
    ROW: gl.constexpr,
    LEAVES: gl.constexpr,
    SPLIT: gl.constexpr,
    WHOLE: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Computes with one warpgroup: 64 rows of w, ROW .. ROW + 63 of the tile. WHOLE: some tiles are."""
    stage = 0
    phase = 0
    for item in range(gl.program_id(0), items.count, gl.num_programs(0)):
        tile, part = place(item, items, SPLIT)
        n0 = tile // items.columns * (64 * HALVES) + ROW
        m0 = tile % items.columns * ring.BN
        spot = (tile - items.whole) * HALVES + ROW // 64
        mine = nodes + spot.to(gl.int64) * (SPLIT * 64 * ring.BN)
        if SPLIT == 1:
            v, stage, phase = merged(ring, w, stage, phase, items.extent, LEAVES)
            store_tile(v, y, items, n0, m0)
        elif not WHOLE:
            v, stage, phase = merged(ring, w, stage, phase, items.extent, LEAVES // SPLIT)
            park_part(v, y, mine, arrived + spot, items, n0, m0, part, SPLIT)
        elif part < 0:
            v, stage, phase = merged(ring, w, stage, phase, items.extent, LEAVES)
            store_tile(v, y, items, n0, m0)
        else:
            v, stage, phase = merged(ring, w, stage, phase, items.extent, LEAVES // SPLIT)
            park_part(v, y, mine, arrived + spot, items, n0, m0, part, SPLIT)


@early
@gluon.jit(do_not_specialize=["M", "columns", "items", "whole"])
def stream_kernel(
    w,
    ldw,
    wd,
    xd,
    y,
    nodes,
    arrived,
    M,
    N,
    items,
    whole,
    columns,
    extent,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    LEAVES: gl.constexpr,
    SPLIT: gl.constexpr,
    WHOLE: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Computes all items of y = x w^T: one warp produces, a warpgroup consumes for each 64 rows of w. The
    producer waits for the kernels before, and everyone waits for what it loads."""
    ring = allocate(wd, xd, BN, STAGES, False, False, HALVES)
    todo = Items(items, whole, columns, M, N, extent)
    if HALVES == 2:
        gl.warp_specialize(
            [
                (consumer, (ring, ring.a0, y, nodes, arrived, todo, 0, LEAVES, SPLIT, WHOLE, 2)),
                (consumer, (ring, ring.a1, y, nodes, arrived, todo, 64, LEAVES, SPLIT, WHOLE, 2)),
                (producer, (ring, wd, xd, todo, LEAVES, SPLIT, 2)),
                (near, (ring, w, ldw, todo, LEAVES, SPLIT, 2)),
                (idle, ()),
                (idle, ()),
            ],
            [4, 1, 1, 1, 1],
            [240, 24, 24, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (ring, ring.a0, y, nodes, arrived, todo, 0, LEAVES, SPLIT, WHOLE, 1)),
                (producer, (ring, wd, xd, todo, LEAVES, SPLIT, 1)),
                (near, (ring, w, ldw, todo, LEAVES, SPLIT, 1)),
                (idle, ()),
                (idle, ()),
            ],
            [1, 1, 1, 1],
            [24, 24, 24, 24],
        )


def least_split(leaves: int, BN: int) -> int:
    """Returns the smallest split whose leaves can be merged in registers: 3 levels of 64 x 64, 1 of 64 x 128, none of
    64 x 256."""
    return max(1, leaves // {16: 8, 32: 8, 64: 8, 128: 2, 256: 1}[BN])


class Cut(NamedTuple):
    """Says how the tiles of a product are spread: the first `whole` are one item each, the `rest` are `split` items each."""

    columns: int  # tiles of tokens
    whole: int
    rest: int
    split: int

    @property
    def items(self) -> int:
        """Counts the items."""
        return self.whole + self.rest * self.split

    def nodes(self, rows: int, BN: int, device: torch.device) -> torch.Tensor:
        """Allocates what the parts of tiles of rows x BN are parked in."""
        parked = self.rest * rows * self.split * BN if self.split > 1 else 1
        return torch.empty(parked, dtype=torch.float32, device=device)


def cut(M: int, N: int, leaves: int, BN: int, rows: int, split: int, tail: int, blocks: int) -> Cut:
    """Gives every tile of BN tokens and `rows` rows of w to `split` blocks, or, where that is 1, those that do not fill a wave
    of `blocks` to `tail` each."""
    columns = cdiv(M, BN)
    tiles = cdiv(N, rows) * columns
    if split > 1:
        return Cut(columns, 0, tiles, split)
    split = min(tail, leaves)
    whole = tiles if split == 1 else tiles // blocks * blocks
    return Cut(columns, whole, tiles - whole, split)


def contract(
    x: torch.Tensor,
    w: torch.Tensor,
    leaves: int,
    out_dtype: torch.dtype,
    *,
    BN: int,
    split: int,
    rows: int = 128,
    tail: int = 1,
    blocks: int | None = None,
) -> torch.Tensor:
    """Computes y = x w^T on the tree: x [M, K], w [N, K], both as TMA reads them; `leaves` equal leaves, each a multiple of 64.

    split, rows, tail, blocks: see `cut`."""
    (M, K), N = x.shape, w.shape[0]
    card = card_of(x.device)
    blocks = blocks or card.multiprocessors
    y = x.new_empty(M, N, dtype=out_dtype)
    halves = rows // 64
    how = cut(M, N, leaves, BN, rows, max(min(split, leaves), least_split(leaves, BN)), tail, blocks)
    stages = min(12, (card.shared_memory - 2048) // ((rows + BN) * STAGE_BYTES.value))
    run(
        stream_kernel,
        (min(blocks, how.items),),
        w,
        w.stride(0),
        descriptor(w, 64),
        descriptor(x, BN),
        y,
        how.nodes(rows, BN, x.device),
        counters(x.device, how.rest * halves),
        M,
        N,
        how.items,
        how.whole,
        how.columns,
        K // leaves,
        BN,
        stages,
        leaves,
        how.split,
        how.whole > 0,
        halves,
        num_warps=4,
    )
    return y
