"""Plans of the matmul of block-scaled FP8 on Hopper. They choose speed, never bits; tests/kernels/gpu/test_matmul_fp8.py proves
them equal to the reference order."""

from kernels.ops.matmul.hopper.tuning import ManyRows, Stream, padded_rows

MOST_STREAMED = 128
"""Rows above which many_rows.py runs where TABLE has no plan. Not measured: a bf16 weight is streamed up to 256."""

TABLE: dict[tuple[int, int, int, int], Stream | ManyRows] = {}
"""(rows padded to a power of two, N, K, leaves) -> plan. Empty until a card has measured it."""


def plan(M: int, N: int, K: int, leaves: int) -> Stream | ManyRows:
    """Chooses the kernel and its plan."""
    few = Stream(min(64, padded_rows(M)), 1, 64)
    chosen = TABLE.get((padded_rows(M), N, K, leaves)) or ManyRows(MOST_STREAMED, few)
    if not isinstance(chosen, ManyRows):
        return chosen
    return chosen if chosen.above < M and leaves <= 8 else chosen.below
