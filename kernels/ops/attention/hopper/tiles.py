"""What the persistent kernels of packed attention share: a board on which the producer announces a tile in five words to all
others, one of two slots after the other, and rows of a tile that belong to nobody."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels.gpu.dialect import thread_barrier
from kernels.gpu.hopper.ring import advance


@gluon.jit
def barriers(n: gl.constexpr, count: gl.constexpr):
    """Allocates n barriers that wait for `count` arrivals each."""
    b = gl.allocate_shared_memory(gl.int64, [n, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(n):
        mbarrier.init(b.index(i), count=count)
    return b


@gluon.jit
def allocate_board(READERS: gl.constexpr):
    """Returns (words, barriers of the full slots, barriers of those that all READERS have left)."""
    words = gl.allocate_shared_memory(gl.int32, [10, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return words, barriers(2, 1), barriers(2, READERS)


@gluon.jit
def post(board, slot, phase, w0, w1, w2, w3, w4):
    """Announces a tile."""
    words, full, empty = board
    mbarrier.wait(empty.index(slot), phase)
    word = gl.zeros([1], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    words.index(slot * 5).store(word + w0)
    words.index(slot * 5 + 1).store(word + w1)
    words.index(slot * 5 + 2).store(word + w2)
    words.index(slot * 5 + 3).store(word + w3)
    words.index(slot * 5 + 4).store(word + w4)
    mbarrier.arrive(full.index(slot), count=1)
    return advance(slot, phase, 2)


@gluon.jit
def word(words, i, WARPS: gl.constexpr):
    """Reads word i of an announcement into every thread."""
    return gl.sum(words.index(i).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def read(board, slot, phase, WARPS: gl.constexpr):
    """Returns the five words of the tile announced in `slot`; then the next slot and its phase. WARPS: of the reader."""
    words, full, empty = board
    mbarrier.wait(full.index(slot), phase)
    w0 = word(words, slot * 5, WARPS)
    w1 = word(words, slot * 5 + 1, WARPS)
    w2 = word(words, slot * 5 + 2, WARPS)
    w3 = word(words, slot * 5 + 3, WARPS)
    w4 = word(words, slot * 5 + 4, WARPS)
    thread_barrier()
    mbarrier.arrive(empty.index(slot), count=1)
    slot, phase = advance(slot, phase, 2)
    return w0, w1, w2, w3, w4, slot, phase


@gluon.jit
def blank(tile, valid, ROWS: gl.constexpr):
    """Zeros rows >= valid: they belong to a neighbour, and a zero on the other side does not silence a NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    for r in gl.static_range(0, ROWS, 16):
        if valid < r + 16:
            rows = tile.slice(r, 16)
            keep = gl.expand_dims(r + gl.arange(0, 16, gl.SliceLayout(1, LAYOUT)) < valid, 1)
            keep, x = gl.broadcast(keep, rows.load(LAYOUT))
            rows.store(gl.where(keep, x, gl.zeros_like(x)))
    fence_async_shared()
    thread_barrier()  # here, in the caller's branch: else Triton puts one where it ends, on the way of every tile
