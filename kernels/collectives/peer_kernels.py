"""Kernels that read and write the memory of the other ranks. `kernels.collectives.peers` holds the memory and launches them.

Nothing here adds in another order than the tree: a rank first has all the parts it adds, then adds them by `subtree`.
"""

import triton
import triton.language as tl

REDUCE, SCATTER, GATHER, WHOLE = (tl.constexpr(kind) for kind in range(4))
"""What a kernel does: see `stream_kernel`."""


@triton.jit
def signal(flags, at, value, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Sets flags[p][at] = value at every other rank, after everything that this block has read and written.

    The barrier orders the block's threads before thread 0, and its fence is cumulative over them."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; @p fence.acq_rel.sys; mov.u32 $0, t; }",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    for p in tl.static_range(WORLD):
        if p != RANK:
            tl.inline_asm_elementwise(
                """{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
                @p st.relaxed.sys.global.u32 [$1], $2; mov.u32 $0, t; }""",
                "=r,l,r",
                [flags[p] + 4 * at, value],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def wait(mine, value, RANK: tl.constexpr, WORLD: tl.constexpr):
    """Waits until mine[p] >= value (modulo 2^32) for every other rank p; what they wrote before they said so is then
    visible."""
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .pred q; .reg .u32 t; .reg .s32 v; .reg .u64 a;
        mov.u32 t, %tid.x; setp.ge.u32 p, t, $4; setp.eq.u32 q, t, $3; or.pred p, p, q; @p bra done;
        mul.wide.u32 a, t, 4; add.u64 a, a, $1;
        again: ld.acquire.sys.global.s32 v, [a]; sub.s32 v, v, $2; setp.lt.s32 q, v, 0; @q bra again;
        done: mov.u32 $0, t; }""",
        "=r,l,r,r,r",
        [mine, value, RANK, WORLD],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()


@triton.jit
def word(box, tag, inside):
    """Returns the 32 bits of each word whose upper half has become `tag`."""
    w = tl.load(box, inside, other=tag << 32, volatile=True)
    while tl.max(((w >> 32) != tag).to(tl.int32), 0) != 0:
        w = tl.load(box, inside, other=tag << 32, volatile=True)
    return (w & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def tagged_subtree(box, own, tag, inside, CAPACITY, RANK: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Returns the root over ranks FIRST .. FIRST + COUNT - 1, as `kernels.tree.fold` has it for a power of two."""
    if COUNT == 1:
        if FIRST == RANK:
            return own
        else:
            return word(box + FIRST * CAPACITY, tag, inside).to(tl.float32, bitcast=True)
    else:
        left = tagged_subtree(box, own, tag, inside, CAPACITY, RANK, FIRST, COUNT // 2)
        right = tagged_subtree(box, own, tag, inside, CAPACITY, RANK, FIRST + COUNT // 2, COUNT // 2)
        return left + right


@triton.jit
def tagged_kernel(
    x,
    out,
    boxes,
    calls,
    n,
    CAPACITY,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """Reduces or gathers small tensors in one crossing. REDUCE: out = tree sum over ranks of float32 x [n]. GATHER: out
    [WORLD, n] = every rank's integers x [n].

    A value travels as 64 bits, itself and the number of the call, which no store tears: no flag, no fence, one way across.
    Even and odd calls use their own boxes. A rank that has finished call c has a word of call c from every rank, so each
    of them has finished call c - 1, and their boxes of that call may be written again in call c + 1.
    """
    b = tl.program_id(0)
    call = tl.load(calls + b) + 1
    tag = call.to(tl.int64)
    half = (tag & 1) * WORLD * CAPACITY
    at = b * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    own = tl.load(x + at, inside, other=0)
    if KIND == REDUCE:
        bits = own.to(tl.int32, bitcast=True)
    else:
        bits = own.to(tl.int32)
    packed = (tag << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    for p in tl.static_range(WORLD):
        if p != RANK:
            box = tl.multiple_of(boxes[p].to(tl.pointer_type(tl.int64)), 16) + half + RANK * CAPACITY
            tl.store(box + at, packed, inside)
    mine = tl.multiple_of(boxes[RANK].to(tl.pointer_type(tl.int64)), 16) + half + at
    if KIND == REDUCE:
        root = tagged_subtree(mine, own, tag, inside, CAPACITY, RANK, 0, WORLD)
        tl.store(out + at, root.to(out.dtype.element_ty), inside)
    else:
        for p in tl.static_range(WORLD):
            if p == RANK:
                tl.store(out + p * tl.cast(n, tl.int64) + at, own, inside)
            else:
                got = word(mine + p * CAPACITY, tag, inside)
                tl.store(out + p * tl.cast(n, tl.int64) + at, got.to(own.dtype), inside)
    for i in range(b, COUNTERS, tl.num_programs(0)):  # every block's counter, so that calls of any size agree
        tl.store(calls + i, call)


@triton.jit
def slot(address, index, dtype: tl.constexpr, STRIDE: tl.constexpr):
    """Returns where words of `dtype` begin in slot `index` of the area at `address`; every slot is 4 * STRIDE bytes."""
    return tl.multiple_of((address + index * (4 * STRIDE)).to(tl.pointer_type(dtype)), 16)


@triton.jit
def subtree(ready, own, inside, RANK: tl.constexpr, STRIDE: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Returns the root over ranks FIRST .. FIRST + COUNT - 1 of the float32 parts at `ready`, and of this rank's own."""
    if COUNT == 1:
        if FIRST == RANK:
            return own
        else:
            return tl.load(ready + FIRST * STRIDE, inside, other=0.0)
    else:
        left = subtree(ready, own, inside, RANK, STRIDE, FIRST, COUNT // 2)
        right = subtree(ready, own, inside, RANK, STRIDE, FIRST + COUNT // 2, COUNT // 2)
        return left + right


@triton.jit
def stream_kernel(
    x,
    out,
    parts,
    rounded,
    flags,
    steps,
    n,
    slice_,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    KIND: tl.constexpr,
    PIECE: tl.constexpr,
    STRIDE: tl.constexpr,
    SLOTS: tl.constexpr,
    LAG: tl.constexpr,
):
    """Reduces, scatters or gathers large tensors, slice by slice. REDUCE: out [n] = tree sum over ranks of x [n]; rank r adds
    and rounds the r-th slice, `slice_` long. WHOLE: the same sum, but every rank adds everything. SCATTER: out [n] = tree sum
    of part r of x [WORLD * n]. GATHER: out [WORLD, n] = every rank's x [n].

    Block b owns the pieces b, b + blocks, ... of a slice and talks to block b of the other ranks alone. It walks steps.
    Step g, once every other rank has finished step g - LAG,
        sends piece i to the ranks that add it,
        adds piece i - LAG, and sends the rounded sum to everyone (REDUCE),
        copies the rounded sums of piece i - 2 LAG (REDUCE),
    so that the three overlap and the link is not idle. What step g sends lies in slot g % SLOTS, where step g + LAG reads
    it. Step g + SLOTS writes there again, and waits for step g + SLOTS - LAG: SLOTS >= 2 LAG is enough. Steps count on from
    call to call (`steps`, in device memory), which is why a captured launch may be replayed and calls of any size and kind
    may follow one another. A call's first step need not wait: the last step of the call before has waited for the same.
    """
    b = tl.program_id(0)
    blocks = tl.num_programs(0)
    first = tl.load(steps + b)
    pieces = tl.cdiv(slice_, PIECE * blocks)
    last: tl.constexpr = 2 * LAG if KIND == REDUCE else LAG
    part: tl.constexpr = x.dtype.element_ty
    sum_: tl.constexpr = out.dtype.element_ty
    lane = tl.arange(0, PIECE)
    n = tl.cast(n, tl.int64)
    slice_ = tl.cast(slice_, tl.int64)
    slots = b.to(tl.int64) * SLOTS
    for i in range(0, pieces + last):
        g = first + i
        fresh = (slots + (g & (SLOTS - 1))) * WORLD
        ready = (slots + ((g - LAG) & (SLOTS - 1))) * WORLD
        at = (i.to(tl.int64) * blocks + b) * PIECE + lane
        before = at - LAG * blocks * PIECE
        if i > 0:
            wait(flags[RANK] + 4 * b * WORLD, g - LAG + 1, RANK, WORLD)
        if i < pieces:
            for p in tl.static_range(WORLD):
                if p != RANK:
                    box = slot(parts[p], fresh + RANK, part, STRIDE)
                    if KIND == REDUCE:
                        inside = (at < slice_) & (p * slice_ + at < n)
                        tl.store(box + lane, tl.load(x + p * slice_ + at, inside), inside)
                    elif KIND == SCATTER:
                        tl.store(box + lane, tl.load(x + p * n + at, at < n), at < n)
                    else:
                        tl.store(box + lane, tl.load(x + at, at < n), at < n)
            if KIND == GATHER:
                tl.store(out + RANK * n + at, tl.load(x + at, at < n), at < n)
        if i >= LAG and i < pieces + LAG:
            here = slot(parts[RANK], ready, part, STRIDE) + lane
            if KIND == REDUCE:
                inside = (before < slice_) & (RANK * slice_ + before < n)
                own = tl.load(x + RANK * slice_ + before, inside, other=0.0)
                root = subtree(here, own, inside, RANK, STRIDE, 0, WORLD).to(sum_)
                for p in tl.static_range(WORLD):
                    if p != RANK:
                        tl.store(slot(rounded[p], fresh + RANK, sum_, STRIDE) + lane, root, inside)
                tl.store(out + RANK * slice_ + before, root, inside)
            elif KIND == GATHER:
                for p in tl.static_range(WORLD):
                    if p != RANK:
                        theirs = slot(parts[RANK], ready + p, part, STRIDE) + lane
                        tl.store(out + p * n + before, tl.load(theirs, before < n), before < n)
            else:
                inside = before < n
                own = tl.load(x + (RANK * n if KIND == SCATTER else 0) + before, inside, other=0.0)
                root = subtree(here, own, inside, RANK, STRIDE, 0, WORLD)
                tl.store(out + before, root.to(sum_), inside)
        if KIND == REDUCE and i >= 2 * LAG:
            old = before - LAG * blocks * PIECE
            for p in tl.static_range(WORLD):
                if p != RANK:
                    inside = (old < slice_) & (p * slice_ + old < n)
                    sums = slot(rounded[RANK], ready + p, sum_, STRIDE) + lane
                    tl.store(out + p * slice_ + old, tl.load(sums, inside), inside)
        # The last step sends nothing: the first of the next call has its number and speaks for both.
        if i + 1 < pieces + last:
            signal(flags, b * WORLD + RANK, g + 1, RANK, WORLD)
    tl.debug_barrier()
    tl.store(steps + b, first + pieces + last - 1)
