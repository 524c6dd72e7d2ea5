"""How leaves of one length meet in registers: a loop goes through the steps of several leaves, so that what it loads ahead is
never used up between two of them."""

import triton
import triton.language as tl

MOST = tl.constexpr(8)
"""Leaves of one loop."""


@triton.jit
def meet(leaf, total, n0, n1, n2, COUNT: tl.constexpr):
    """Takes in leaf number `leaf` of COUNT, a power of two up to MOST, which is not the last of them: returns the nodes of
    levels 0, 1 and 2 that wait for their sibling."""
    if COUNT >= 8:
        n2 = tl.where(leaf % 8 == 3, n1 + (n0 + total), n2)
    if COUNT >= 4:
        n1 = tl.where(leaf % 4 == 1, n0 + total, n1)
    if COUNT >= 2:
        n0 = tl.where(leaf % 2 == 0, total, n0)
    return n0, n1, n2


@triton.jit
def root_of(total, n0, n1, n2, COUNT: tl.constexpr):
    """Returns the root of COUNT leaves, of which `total` is the last."""
    if COUNT >= 2:
        total = n0 + total
    if COUNT >= 4:
        total = n1 + total
    if COUNT >= 8:
        total = n2 + total
    return total
