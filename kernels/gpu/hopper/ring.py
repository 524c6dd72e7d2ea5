"""The pieces of the Hopper kernels (Gluon, sm_90a): a ring of shared-memory stages that one warp fills by TMA and never stops
filling, and the leaves, which two consumer warpgroups of 64 rows take from it.

An operand may lie with its contraction index contiguous (a weight in a forward) or its row index contiguous (`MN`: gradients);
TMA boxes are then [k, rows], and wgmma reads them transposed.

Five traps of Triton 3.6 that shaped the code: one named producer warp leaves three padding warps with too many registers,
hence `idle`; a carried `previous = stage` is taken for a constant, hence `before`; peeling the first product off the loop
spills; zeros that are written between two products serialize all of them, hence the wait in `zeros`; and a NamedTuple
forgets constants when it is assigned, hence `Ring` is an aggregate.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.gpu.dialect import aggregate, load_boxes
from kernels.gpu.launch import Descriptor, boxes

STAGE_BYTES = gl.constexpr(128)
"""Bytes of a row in one stage: one swizzle row."""
BK = STAGE_BYTES.value // 2
"""Contraction steps of one stage of bf16."""


@gluon.constexpr_function
def stage_steps(dtype):  # type: ignore[no-untyped-def]
    """Returns the contraction steps of a stage of a dtype."""
    return STAGE_BYTES.value * 8 // dtype.primitive_bitwidth


@aggregate
class Ring:
    """Holds STAGES stages in shared memory, and their barriers. Of a: 64 rows for each consumer. BK: contraction steps of a
    stage, 64 of bf16 or 128 of e4m3."""

    a0: gl.shared_memory_descriptor  # [STAGES, 64, BK]; [STAGES, BK, 64] where A_MN
    a1: gl.shared_memory_descriptor  # the same
    b: gl.shared_memory_descriptor  # [STAGES, BN, BK]; [STAGES, BK, BN] where B_MN
    full: gl.shared_memory_descriptor  # [STAGES]: the stage has arrived
    empty: gl.shared_memory_descriptor  # [STAGES]: every consumer has used it
    BN: gl.constexpr
    BK: gl.constexpr
    STAGES: gl.constexpr
    A_MN: gl.constexpr
    B_MN: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, a0, a1, b, full, empty, BN, STAGES, A_MN, B_MN):  # type: ignore[no-untyped-def]
        self.a0 = a0
        self.a1 = a1
        self.b = b
        self.full = full
        self.empty = empty
        self.BN = gl.constexpr(BN)
        self.BK = gl.constexpr(stage_steps(a0.dtype))
        self.STAGES = gl.constexpr(STAGES)
        self.A_MN = gl.constexpr(A_MN)
        self.B_MN = gl.constexpr(B_MN)


@gluon.constexpr_function
def accumulator(BN: int, STEPS: int = 16):  # type: ignore[no-untyped-def]
    """Returns the register layout of a 64 x BN wgmma accumulator of one warpgroup. STEPS of one instruction: 16 of bf16, 32 of
    e4m3; registers are the same."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, STEPS])


@gluon.constexpr_function
def park_layout(width: int):  # type: ignore[no-untyped-def]
    """Returns float32 [64, width] in the order of the accumulator's registers: (2 columns, 2 rows 8 apart), lanes,
    warps, rest."""
    bases = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], [16, 0], [32, 0]]
    column = 8
    while column < width:
        bases.append([0, column])
        column *= 2
    return gl.SharedLinearLayout(bases)


@gluon.constexpr_function
def box_layout(rows: int, columns: int):  # type: ignore[no-untyped-def]
    """Returns the shared-memory layout of a TMA box of bf16 [rows, columns]."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


@gluon.jit
def allocate(
    ad,
    bd,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    A_MN: gl.constexpr,
    B_MN: gl.constexpr,
    HALVES: gl.constexpr = 2,
):
    """Returns a ring for the boxes of two descriptors. HALVES: consumers, of 64 rows each."""
    a0 = gl.allocate_shared_memory(ad.dtype, [STAGES, ad.block_shape[0], ad.block_shape[1]], ad.layout)
    if HALVES == 2:
        a1 = gl.allocate_shared_memory(ad.dtype, [STAGES, ad.block_shape[0], ad.block_shape[1]], ad.layout)
    else:
        a1 = a0
    b = gl.allocate_shared_memory(bd.dtype, [STAGES, bd.block_shape[0], bd.block_shape[1]], bd.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=HALVES)
    fence_async_shared()
    return Ring(a0, a1, b, full, empty, BN, STAGES, A_MN, B_MN)


@gluon.jit
def park(ring, L: gl.constexpr):
    """Returns room for what one consumer parks: see `subtree`. Below eight leaves nothing is."""
    if L == 8:
        return gl.allocate_shared_memory(gl.float32, [1, 64, ring.BN], park_layout(ring.BN))
    else:
        return ring.b


@gluon.jit
def tile_origin(t, rows, columns, GROUP: gl.constexpr):
    """Returns tile t of a rows x columns grid, walked in bands of GROUP rows so that neighbours share operands in L2."""
    band = GROUP * columns
    first = (t // band) * GROUP
    height = gl.minimum(rows - first, GROUP)
    r = t % band
    return first + r % height, r // height


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """Moves to the next stage of the ring and flips the phase where the ring begins anew."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def before(stage, STAGES: gl.constexpr):
    """Returns the stage before `stage` in the ring."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def copy(ring, ad, bd, m0, n0, k_a, k_b, stage, HALVES: gl.constexpr = 2):
    """Copies one stage of both operands: 64 * HALVES rows of a, BN of b, BK contraction steps from k_a and k_b."""
    bar = ring.full.index(stage)
    if ring.A_MN:
        load_boxes(ad, [k_a, m0], bar, ring.a0.index(stage))
        if HALVES == 2:
            load_boxes(ad, [k_a, m0 + 64], bar, ring.a1.index(stage))
    else:
        load_boxes(ad, [m0, k_a], bar, ring.a0.index(stage))
        if HALVES == 2:
            load_boxes(ad, [m0 + 64, k_a], bar, ring.a1.index(stage))
    if ring.B_MN:
        load_boxes(bd, [k_b, n0], bar, ring.b.index(stage))
    else:
        load_boxes(bd, [n0, k_b], bar, ring.b.index(stage))


@gluon.jit
def reserve(ring, stage, phase, HALVES: gl.constexpr = 2):
    """Waits until the stage is free, and announces the bytes that will come."""
    mbarrier.wait(ring.empty.index(stage), phase)
    mbarrier.expect(ring.full.index(stage), (64 * HALVES + ring.BN) * STAGE_BYTES)


@gluon.jit
def fill(ring, ad, bd, m0, n0, first_a, first_b, extent, stage, phase, HALVES: gl.constexpr = 2):
    """Fills the stages of one leaf: `extent` steps from first_a in a and first_b in b."""
    for k in range(0, extent, ring.BK):
        reserve(ring, stage, phase, HALVES)
        copy(ring, ad, bd, m0, n0, first_a + k, first_b + k, stage, HALVES)
        stage, phase = advance(stage, phase, ring.STAGES)
    return stage, phase


@gluon.jit
def idle():
    """Fills up the producer's warpgroup."""
    pass


@gluon.jit
def product(a, b, total, use, A_MN: gl.constexpr, B_MN: gl.constexpr):
    """Computes total + a b^T of one stage; from zero where not `use`."""
    x = a
    w = b
    if A_MN:
        x = a.permute((1, 0))
    if not B_MN:
        w = b.permute((1, 0))
    return warpgroup_mma(x, w, total, use_acc=use, is_async=True)


@gluon.jit
def leaf(ring, a, stage, phase, extent):
    """Computes one fp32 chain over the stages of a leaf, from zero; `a`: this consumer's rows in the ring. Product i
    runs while stage i - 1 is handed back. An empty leaf has no stage."""
    total = gl.zeros([64, ring.BN], gl.float32, accumulator(ring.BN))
    steps = gl.cdiv(extent, ring.BK)
    for i in range(steps):
        mbarrier.wait(ring.full.index(stage), phase)
        total = product(a.index(stage), ring.b.index(stage), total, i > 0, ring.A_MN, ring.B_MN)
        total = warpgroup_mma_wait(1, deps=(total,))
        mbarrier.arrive(ring.empty.index(before(stage, ring.STAGES)), count=1, pred=i > 0)
        stage, phase = advance(stage, phase, ring.STAGES)
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(ring.empty.index(before(stage, ring.STAGES)), count=1, pred=steps > 0)
    return total, stage, phase


@gluon.jit
def zeros(BN: gl.constexpr):
    """Returns the zero accumulators of two leaves."""
    ACC: gl.constexpr = accumulator(BN)
    even = gl.zeros([64, BN], gl.float32, ACC)
    odd = gl.zeros([64, BN], gl.float32, ACC)
    odd, even = warpgroup_mma_wait(0, deps=(odd, even))  # pins both zeros here
    return even, odd


@gluon.jit
def pair(ring, a, stage, phase, extent0, extent1, even, odd):
    """Returns (sum of two leaves, neither empty, ...). The second begins while the last product of the first still
    runs. `even`, `odd`: registers for them."""
    steps = gl.cdiv(extent0, ring.BK)
    for i in range(steps):
        mbarrier.wait(ring.full.index(stage), phase)
        even = product(a.index(stage), ring.b.index(stage), even, i > 0, ring.A_MN, ring.B_MN)
        even = warpgroup_mma_wait(1, deps=(even,))
        mbarrier.arrive(ring.empty.index(before(stage, ring.STAGES)), count=1, pred=i > 0)
        stage, phase = advance(stage, phase, ring.STAGES)
    more = gl.cdiv(extent1, ring.BK)
    for i in range(more):
        mbarrier.wait(ring.full.index(stage), phase)
        odd = product(a.index(stage), ring.b.index(stage), odd, i > 0, ring.A_MN, ring.B_MN)
        odd, even = warpgroup_mma_wait(1, deps=(odd, even))
        mbarrier.arrive(ring.empty.index(before(stage, ring.STAGES)), count=1, pred=i + steps > 0)
        stage, phase = advance(stage, phase, ring.STAGES)
    odd, even = warpgroup_mma_wait(0, deps=(odd, even))
    mbarrier.arrive(ring.empty.index(before(stage, ring.STAGES)), count=1, pred=steps + more > 0)
    return even + odd, stage, phase, even, odd


@gluon.jit
def flat(v):
    """Returns [64, W] -> [64 W] in the order of the accumulator's registers, four neighbours to a thread: no data moves."""
    W: gl.constexpr = v.shape[1]
    v = gl.permute(gl.reshape(v, [4, 2, 8, W // 8, 4, 2]), [3, 0, 2, 4, 1, 5])
    return gl.reshape(v, [64 * W])


@gluon.jit
def tile_of(v, W: gl.constexpr, ACC: gl.constexpr):
    """Returns what `flat` made flat."""
    v = gl.permute(gl.reshape(v, [W // 8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
    return gl.convert_layout(gl.reshape(v, [64, W]), ACC, assert_trivial=True)


@gluon.jit
def bound(bounds, j, leaves):
    """Loads bounds[j] as int32; past the last leaf it is the last bound."""
    return gl.load(bounds + gl.minimum(j, leaves)).to(gl.int32)


@gluon.jit
def subtree(ring, a, parked, stage, phase, extent, bounds, first_leaf, leaves, L: gl.constexpr, GROUPED: gl.constexpr):
    """Returns the root of L leaves, as they come: leaf j closes as many levels as j has trailing one bits. A finished
    subtree of level 0 or 1 waits for its sibling in registers (of a 128 x 128 tile 64 each, of 240), one of level 2 in
    shared memory (64 KB).

    Leaves are `extent` long, or, where GROUPED, lie between `bounds`. An empty one of these, as all past `leaves` are, has a
    stage of zeros: it adds +0, which changes no bit of a sum that started from +0. The next bound is loaded meanwhile."""
    ACC: gl.constexpr = accumulator(ring.BN)
    if L == 1:
        if GROUPED:
            extent = gl.maximum(bound(bounds, first_leaf + 1, leaves) - bound(bounds, first_leaf, leaves), 1)
        v, stage, phase = leaf(ring, a, stage, phase, extent)
    else:
        extent0 = extent
        extent1 = extent
        if GROUPED:
            first = bound(bounds, first_leaf, leaves)
            middle = bound(bounds, first_leaf + 1, leaves)
            last = bound(bounds, first_leaf + 2, leaves)
        even, odd = zeros(ring.BN)
        for j in gl.static_range(L // 2):
            if GROUPED:
                extent0 = gl.maximum(middle - first, 1)
                extent1 = gl.maximum(last - middle, 1)
                first = last
                middle = bound(bounds, first_leaf + 2 * j + 3, leaves)
                last = bound(bounds, first_leaf + 2 * j + 4, leaves)
            v, stage, phase, even, odd = pair(ring, a, stage, phase, extent0, extent1, even, odd)
            if j % 2 == 0 and L > 2:
                level1 = v
            elif j % 2 == 1:
                v = level1 + v
                if L == 8:
                    if j == 1:
                        tma.store_wait(0)  # the previous tile's output leaves through the same memory
                        parked.index(0).store(v)
                    else:
                        v = parked.index(0).load(ACC) + v
    return v, stage, phase


def stages(shared: int, L: int, BN: int, output: bool = True) -> int:
    """Counts the stages that fit into `shared` bytes of a block beside the parked level (or, where there is one, the output
    tile)."""
    parked = (1.0 if L == 8 else 0.5 * output) * 128 * BN * 4
    return int((shared - 1024 - parked) // ((128 + BN) * STAGE_BYTES.value))


def descriptor(t: torch.Tensor, rows: int, mn: bool = False) -> Descriptor:
    """Describes TMA boxes of `rows` x BK of an operand [rows, k]; where `mn`, `t` is given as it lies, [k, rows]."""
    steps = STAGE_BYTES.value // t.itemsize
    return boxes(t, steps, rows) if mn else boxes(t, rows, steps)


def reachable(t: torch.Tensor) -> bool:
    """Says whether TMA can read `t`: contiguous rows, 16-byte aligned base and row stride."""
    aligned = t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0
    return t.stride(1) == 1 and aligned and t.stride(0) >= t.shape[1]
