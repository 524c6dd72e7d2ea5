"""Blocks in step. The tiles of a wave share rows of a and of b, so their blocks read the same stages at about the same time and
most reads hit L2. Nothing keeps it so: blocks drift apart, by more with every tile, until what one has read has left L2
before the next asks for it. So producers wait for each other, while the ring they filled keeps the consumers busy.

This decides no bit and cannot hang: a block that has polled in vain PATIENCE times (another kernel may hold a multiprocessor,
so that not all blocks run at once) never waits again.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

PERIOD = 64
"""Stages after which a block waits, before its next leaf."""
PATIENCE = gl.constexpr(64)


@gluon.jit
def in_step(pace, everyone, more, since, target, patient, EVERY: gl.constexpr):
    """Keeps blocks in step: before `more` stages, if EVERY are done since the last wait, and `everyone` has a tile of this
    wave, waits for the other blocks. Returns the new (stages since the last wait, arrivals that it waited for, patience
    left).

    `pace`: two zeroed counters, of arrivals and of blocks that have left."""
    if everyone & (since >= EVERY):
        since = 0
        target += gl.num_programs(0)
        gl.atomic_add(pace, 1, sem="relaxed")
        polls = 0
        while patient & (gl.load(pace, volatile=True) < target):
            polls += 1
            patient = polls < PATIENCE
    return since + more, target, patient


@gluon.jit
def leave(pace):
    """Leaves the counters; the last block to do so sets the counters back to zero."""
    if gl.atomic_add(pace + 1, 1, sem="acq_rel") == gl.num_programs(0) - 1:
        gl.store(pace, 0)
        gl.store(pace + 1, 0)
