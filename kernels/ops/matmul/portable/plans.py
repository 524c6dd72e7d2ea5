"""Plans of few_rows.py. They choose speed, never bits."""

from typing import NamedTuple

from kernels.gpu.card import Card


class FewRows(NamedTuple):
    """Holds the tile of few_rows.py: rows of w, steps of the contraction, blocks that share the leaves."""

    BN: int
    BK: int
    split: int
    warps: int
    stages: int


def few_rows_plan(M: int, N: int, leaves: int, multiprocessors: int) -> FewRows:
    """Chooses a plan: tiles wide enough to load well, and enough to keep the card busy. Chosen on an H200."""
    if M > 256:
        return FewRows(64, 64, 1, 8, 3)  # three levels of the tree and a leaf of 64 x 128 in registers
    if M > 64:
        return FewRows(128, 64, min(leaves, 8), 8, 3)
    wanted = 2 * multiprocessors * 64 // N  # blocks of a tile of columns, for two on each multiprocessor
    split = 1 << (max(1 if M <= 32 else 2, min(leaves, wanted)).bit_length() - 1)
    if leaves > 1 and N // 64 * split >= multiprocessors:
        return FewRows(64, 128, split, 4, 4 if M <= 32 else 3)
    if leaves == 1:
        BN = next((n for n in (64, 32) if N // n >= multiprocessors), 16)
        return FewRows(BN, 128, 1, 4 if 32 * multiprocessors <= N else 2, 4)
    split = min(leaves, 4)
    return FewRows(next((n for n in (64, 32) if N // n * split >= multiprocessors), 16), 128, split, 4, 4)


class ManyRows(NamedTuple):
    """Holds the tile of grouped.py: rows and columns, steps of the contraction, leaves that meet in registers."""

    BM: int
    BN: int
    BK: int
    unit: int
    warps: int
    stages: int


def many_rows_plan(M: int, N: int, leaves: int, equal: bool, card: Card) -> ManyRows:
    """Chooses a plan for grouped.py; `equal`: the leaves are. Chosen on an H200, whose wgmma takes operands from shared memory;
    elsewhere they are in registers too, and a unit has half as many leaves."""
    BM, BN = 64 if M <= 64 else 128, 64 if N <= 64 else 128
    if card.capability != (9, 0):
        return ManyRows(BM, BN, 32, min(2, leaves), 8, 4)
    if leaves == 1 and not equal and BN == 128 and BM == 128:
        return ManyRows(128, 256, 64, 1, 8, 3)
    return ManyRows(BM, BN, 64, min(4, leaves), 8, 4)
