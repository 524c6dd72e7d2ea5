"""Many rows (training, prefill): y = a b^T on the tree of 1, 2, 4 or 8 equal leaves; persistent and warp-specialised.

A block owns tiles of 128 x BN and walks the tree of each as ring.py says. A bf16 output leaves by TMA through the shared memory
of level 2, a float32 one from registers.

`EPILOGUE` is what becomes of a root: stored (0), or, for the vocabulary (kernels.ops.logprob.portable.nodes), folded to a node
of the log-sum-exp (1), the exponentials of which may be stored too (2).
"""

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from kernels.gpu.card import card_of
from kernels.gpu.dialect import reinterpret, store_boxes
from kernels.gpu.hopper.pace import PERIOD, in_step, leave
from kernels.gpu.hopper.ring import (
    accumulator,
    allocate,
    box_layout,
    descriptor,
    fill,
    idle,
    park,
    stages,
    subtree,
    tile_origin,
)
from kernels.gpu.launch import boxes, cdiv
from kernels.gpu.launch import launch as run
from kernels.gpu.workspace import counters


class Vocabulary(NamedTuple):
    """Holds what the epilogues over a vocabulary read and write, for each row."""

    inverse: Any  # float32 [M]: 1 / temperature
    target: Any  # int64 [M]
    picked: Any  # float32 [M]: the target's logit
    nodes: Any  # float32 [M, tiles of columns, 2]


class Shape(NamedTuple):
    """Holds the extents of a product. Where the columns come in parts (leaves of a vocabulary), tiles are counted from the
    start of a part."""

    M: Any
    N: Any
    columns: Any  # tiles of columns
    part: Any  # columns of a part
    part_tiles: Any  # its tiles
    extent: Any  # contraction steps from one leaf of b to the next
    apart: Any  # the same in a; a multiple of a stage's, with zeros past the end of a leaf


@gluon.jit
def tile_at(tile, shape, GROUP: gl.constexpr, BN: gl.constexpr, PARTS: gl.constexpr):
    """Returns first row, column of tiles, first column and end of columns of a tile."""
    row, column = tile_origin(tile, gl.cdiv(shape.M, 128), shape.columns, GROUP)
    if PARTS:
        index = column // shape.part_tiles
        first = index * shape.part + (column % shape.part_tiles) * BN
        end = gl.minimum(shape.N, (index + 1) * shape.part)
    else:
        first = column * BN
        end = shape.N
    return row * 128, column, first, end


@gluon.jit
def producer(
    ring, ad, bd, pace, shape, GROUP: gl.constexpr, LEAVES: gl.constexpr, PARTS: gl.constexpr, EVERY: gl.constexpr
):
    """Fills the ring with the stages of every leaf of each of the block's tiles, in step with the other blocks."""
    stage = 0
    phase = 1
    tiles = gl.cdiv(shape.M, 128) * shape.columns
    blocks = gl.num_programs(0)
    since = 0
    target = 0
    patient = tiles > blocks
    for tile in range(gl.program_id(0), tiles, blocks):
        m0, column, n0, end = tile_at(tile, shape, GROUP, ring.BN, PARTS)
        everyone = tile - gl.program_id(0) + blocks <= tiles
        for j in range(LEAVES):
            since, target, patient = in_step(pace, everyone, shape.apart // ring.BK, since, target, patient, EVERY)
            stage, phase = fill(ring, ad, bd, m0, n0, j * shape.apart, j * shape.extent, shape.apart, stage, phase)
    leave(pace)


@gluon.jit
def fold_columns(v):
    """Returns [64, W] -> [64]: halves are added until one column is left: `kernels.gpu.arithmetic.fold`."""
    R: gl.constexpr = v.shape[0]
    W: gl.constexpr = v.shape[1]
    if W == 2:
        return gl.sum(v, 1)
    else:
        return fold_columns(gl.sum(gl.reshape(v, [R, 2, W // 2]), 1))


@gluon.jit
def store_box(v, out, yd, row, column):
    """Stores a bf16 tile by TMA, which runs on; `out` is free when the one before has left."""
    tma.store_wait(0)
    out.index(0).store(v.to(gl.bfloat16))
    fence_async_shared()
    store_boxes(yd, [row, column], out.index(0))


@gluon.jit
def consumer(
    ring,
    a,
    parked,
    out,
    yd,
    y,
    vocabulary,
    shape,
    ROW: gl.constexpr,
    GROUP: gl.constexpr,
    LEAVES: gl.constexpr,
    EPILOGUE: gl.constexpr,
):
    """Computes with one warpgroup: rows ROW .. ROW + 63 of every tile of this block."""
    BN: gl.constexpr = ring.BN
    ACC: gl.constexpr = accumulator(BN)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), gl.cdiv(shape.M, 128) * shape.columns, gl.num_programs(0)):
        m0, column, n0, end = tile_at(tile, shape, GROUP, BN, EPILOGUE > 0)
        v, stage, phase = subtree(ring, a, parked, stage, phase, shape.apart, y, 0, 0, LEAVES, False)
        row = m0 + ROW + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        col = n0 + gl.arange(0, BN, gl.SliceLayout(0, ACC))
        inside = (gl.expand_dims(row, 1) < shape.M) & (gl.expand_dims(col, 0) < end)
        if EPILOGUE == 0 and y.dtype.element_ty == gl.float32:
            at = gl.expand_dims(row.to(gl.int64) * shape.N, 1) + gl.expand_dims(col, 0)
            gl.store(y + at, v, mask=inside)
        elif EPILOGUE == 0:
            store_box(v, out, yd, m0 + ROW, n0)
        else:
            there = row < shape.M
            t = gl.load(vocabulary.inverse + row, mask=there, other=1.0)
            own = gl.load(vocabulary.target + row, mask=there, other=-1).to(gl.int32)
            is_own = gl.expand_dims(own, 1) == gl.expand_dims(col, 0)
            picked = vocabulary.picked + gl.expand_dims(row, 1) + gl.expand_dims(col * 0, 0)
            gl.store(picked, v, mask=is_own & inside)
            z = gl.where(inside, v * gl.expand_dims(t, 1), float("-inf"))
            top = gl.max(z, 1)
            safe = gl.where(there, top, 0.0)
            e = gl.exp2((z - gl.expand_dims(safe, 1)) * 1.4426950408889634)
            if EPILOGUE == 2:  # a part is padded to whole tiles with zeros
                store_box(e, out, yd, m0 + ROW, column * BN)
            total = gl.convert_layout(fold_columns(e), gl.SliceLayout(1, ACC))
            node = vocabulary.nodes + (row.to(gl.int64) * shape.columns + column) * 2
            gl.store(node, top, mask=there)
            gl.store(node + 1, total, mask=there)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "columns", "part", "part_tiles", "extent", "apart"])
def tree_kernel(
    ad,
    bd,
    yd,
    y,
    pace,
    vocabulary,
    M,
    N,
    columns,
    part,
    part_tiles,
    extent,
    apart,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    LEAVES: gl.constexpr,
    A_MN: gl.constexpr,
    B_MN: gl.constexpr,
    EPILOGUE: gl.constexpr,
    EVERY: gl.constexpr,
):
    """Computes all tiles of a b^T on the tree of leaves, and ends each with its epilogue."""
    OUT: gl.constexpr = box_layout(64, BN)
    shape = Shape(M, N, columns, part, part_tiles, extent, apart)
    ring = allocate(ad, bd, BN, STAGES, A_MN, B_MN)
    park0 = park(ring, LEAVES)
    park1 = park(ring, LEAVES)
    if LEAVES == 8:
        o0 = reinterpret(park0, gl.bfloat16, [2, 64, BN], OUT)
        o1 = reinterpret(park1, gl.bfloat16, [2, 64, BN], OUT)
    else:
        o0 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], OUT)
        o1 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], OUT)
    gl.warp_specialize(
        [
            (consumer, (ring, ring.a0, park0, o0, yd, y, vocabulary, shape, 0, GROUP, LEAVES, EPILOGUE)),
            (consumer, (ring, ring.a1, park1, o1, yd, y, vocabulary, shape, 64, GROUP, LEAVES, EPILOGUE)),
            (producer, (ring, ad, bd, pace, shape, GROUP, LEAVES, EPILOGUE > 0, EVERY)),
            (idle, ()),
            (idle, ()),
            (idle, ()),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )


def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    y: torch.Tensor,
    M: int,
    N: int,
    leaves: int,
    *,
    a_mn: bool = False,
    b_mn: bool = False,
    BN: int = 128,
    group: int = 8,
    epilogue: int = 0,
    parts: int = 1,
    vocabulary: Vocabulary | None = None,
    apart: int | None = None,
    depth: int | None = None,
    blocks: int | None = None,
    period: int = PERIOD,
) -> None:
    """Computes y = a b^T on the tree: a [M, K] (or, `a_mn`, [K, M]) and b [N, K] (or [K, N]) bf16 -> y [M, N]; or an epilogue
    over `parts` equal parts of N.

    `apart`, a multiple of 64: the leaves of a start so far apart, with zeros past their end (default: where those of b do)."""
    extent = b.shape[0 if b_mn else 1] // leaves
    part_tiles = cdiv(N // parts, BN)
    columns = parts * part_tiles
    card = card_of(a.device)
    grid = (min(blocks or card.multiprocessors, cdiv(M, 128) * columns),)
    run(
        tree_kernel,
        grid,
        descriptor(a, 64, a_mn),
        descriptor(b, BN, b_mn),
        boxes(y, 64, BN) if y.dtype == torch.bfloat16 else y,
        y,
        counters(a.device, 2),
        vocabulary or Vocabulary(y, y, y, y),
        M,
        N,
        columns,
        N // parts,
        part_tiles,
        extent,
        apart or extent,
        BN,
        depth or min(8, stages(card.shared_memory, leaves, BN)),
        group,
        leaves,
        a_mn,
        b_mn,
        epilogue,
        period,
        num_warps=4,
        **({"enable_fp_fusion": False} if epilogue else {}),
    )
