"""Many rows (training, prefill): the ring of gpu/hopper/ring.py over rows sorted by expert; persistent, warp-specialised.

Rows of an expert are padded to whole tiles of 128, so that a tile is of one expert and reads and writes by TMA. Where the tiles
are is known on the device alone: a block asks `starts` how many there are.
"""

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from kernels.gpu.card import card_of
from kernels.gpu.hopper.ring import allocate, box_layout, descriptor, fill, idle, leaf, stages, tile_origin
from kernels.gpu.launch import boxes, cdiv
from kernels.gpu.launch import launch as run
from kernels.ops.dispatch import Slots
from kernels.ops.experts import TILE
from kernels.ops.matmul.hopper.many_rows import store_box


class Tiles(NamedTuple):
    """Counts and places the tiles of y [rows, N], of which the device knows the number."""

    block_expert: Any  # int32 [row tiles]
    rows: Any  # int32: the address of the number of rows in use
    columns: Any  # tiles of columns
    width: Any  # rows (or, B_MN, columns of the contraction) of one expert in b
    extent: Any  # of the contraction


@gluon.jit
def producer(ring, ad, bd, tiles, GROUP: gl.constexpr):
    """Fills the ring with the rows of each of the block's tiles and the matrix of the tile's expert."""
    stage = 0
    phase = 1
    row_tiles = gl.load(tiles.rows) // 128
    for tile in range(gl.program_id(0), row_tiles * tiles.columns, gl.num_programs(0)):
        row, column = tile_origin(tile, row_tiles, tiles.columns, GROUP)
        first = gl.load(tiles.block_expert + row) * tiles.width
        n0 = column * ring.BN
        if ring.B_MN:
            stage, phase = fill(ring, ad, bd, row * 128, n0, 0, first, tiles.extent, stage, phase)
        else:
            stage, phase = fill(ring, ad, bd, row * 128, first + n0, 0, 0, tiles.extent, stage, phase)


@gluon.jit
def consumer(ring, a, out, yd, tiles, ROW: gl.constexpr, GROUP: gl.constexpr):
    """Computes with one warpgroup: rows ROW .. ROW + 63 of every tile of this block."""
    stage = 0
    phase = 0
    row_tiles = gl.load(tiles.rows) // 128
    for tile in range(gl.program_id(0), row_tiles * tiles.columns, gl.num_programs(0)):
        row, column = tile_origin(tile, row_tiles, tiles.columns, GROUP)
        v, stage, phase = leaf(ring, a, stage, phase, tiles.extent)
        store_box(v, out, yd, row * 128 + ROW, column * ring.BN)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["columns"])
def many_experts_kernel(
    ad,
    bd,
    yd,
    block_expert,
    rows,
    columns,
    width,
    extent,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    B_MN: gl.constexpr,
):
    """Computes all tiles of 128 rows x BN columns, each of one expert."""
    OUT: gl.constexpr = box_layout(64, BN)
    tiles = Tiles(block_expert, rows, columns, width, extent)
    ring = allocate(ad, bd, BN, STAGES, False, B_MN)
    o0 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], OUT)
    o1 = gl.allocate_shared_memory(gl.bfloat16, [1, 64, BN], OUT)
    gl.warp_specialize(
        [
            (consumer, (ring, ring.a0, o0, yd, tiles, 0, GROUP)),
            (consumer, (ring, ring.a1, o1, yd, tiles, 64, GROUP)),
            (producer, (ring, ad, bd, tiles, GROUP)),
            (idle, ()),
            (idle, ()),
            (idle, ()),
        ],
        [4, 1, 1, 1, 1],
        [240, 24, 24, 24, 24],
    )


def product(
    a: torch.Tensor, b: torch.Tensor, slots: Slots, *, b_mn: bool = False, BN: int | None = None, group: int = 8
) -> torch.Tensor:
    """Multiplies a [capacity, K] times b [experts * N, K] -> [capacity, N]; or, `b_mn`, times b [experts * K, N], which lies
    so."""
    K = a.shape[1]
    N = b.shape[1] if b_mn else b.shape[0] // slots.experts
    BN = BN or (256 if N % 256 == 0 and not b_mn else 128)
    y = a.new_empty(slots.capacity, N)
    columns, card = cdiv(N, BN), card_of(a.device)
    tiles = slots.capacity // TILE * columns
    run(
        many_experts_kernel,
        (min(card.multiprocessors, tiles),),
        descriptor(a, 64),
        descriptor(b, BN, b_mn),
        boxes(y, 64, BN),
        slots.block_expert,
        slots.starts[-1:],
        columns,
        K if b_mn else N,
        K,
        BN,
        min(8, stages(card.shared_memory, 1, BN)),
        group,
        b_mn,
        num_warps=4,
    )
    return y
