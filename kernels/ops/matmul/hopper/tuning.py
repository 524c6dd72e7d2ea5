"""Tuning tables of the matmul on Hopper, measured on one H100. They choose speed, never bits;
tests/kernels/gpu/test_matmul.py proves every entry equal to the reference order."""

from typing import NamedTuple

from kernels.ops.matmul.portable.plans import FewRows


class Stream(NamedTuple):
    """Chooses weight_stream.py and its plan."""

    BN: int
    split: int
    rows: int = 128
    tail: int = 1


class ManyRows(NamedTuple):
    """Chooses many_rows.py, which has nothing to choose, for more than `above` rows; for fewer `below`."""

    above: int
    below: Stream


TABLE: dict[tuple[int, int, int, int], FewRows | Stream | ManyRows] = {
    (16, 768, 4096, 8): FewRows(16, 128, 8, 2, 4),  # 1.32
    (16, 1536, 4096, 8): FewRows(32, 128, 8, 4, 4),  # 1.18
    (16, 3072, 4096, 8): FewRows(64, 128, 8, 4, 3),  # 1.11
    (16, 4096, 512, 1): FewRows(64, 128, 1, 4, 4),  # 1.14
    (16, 4096, 1024, 2): FewRows(64, 128, 2, 4, 4),  # 0.96
    (16, 4096, 1536, 1): FewRows(64, 128, 1, 4, 4),  # 1.01
    (16, 4096, 2048, 4): FewRows(64, 128, 4, 4, 4),  # 0.95
    (16, 4096, 3072, 2): FewRows(64, 128, 2, 4, 4),  # 1.01
    (16, 4096, 4096, 8): Stream(16, 1, 64),  # 1.09
    (16, 4096, 6144, 4): FewRows(128, 128, 4, 8, 3),  # 1.06
    (16, 4096, 12288, 8): FewRows(64, 128, 4, 4, 4),  # 1.05
    (16, 6144, 4096, 8): Stream(16, 1, 64),  # 1.00
    (16, 12288, 4096, 8): Stream(16, 1, 64),
    (16, 24576, 4096, 8): Stream(16, 1, 64),  # 1.04
    (16, 151936, 4096, 8): Stream(16, 1, 64),  # 1.10
    (16, 128, 2048, 8): FewRows(16, 256, 8, 4, 2),  # 2.0, a router
    (16, 2048, 4096, 8): Stream(16, 1, 64, 4),  # 1.26, and 6% more on an H200
    (16, 5120, 2048, 8): Stream(16, 1, 128),  # 0.96
    (32, 4096, 4096, 8): Stream(32, 1, 64),  # 0.97
    (32, 4096, 12288, 8): Stream(32, 1, 64),  # 1.04
    (32, 6144, 4096, 8): Stream(32, 1, 64),  # 1.02
    (32, 24576, 4096, 8): Stream(32, 1, 64),  # 1.03
    (64, 4096, 512, 1): FewRows(64, 128, 1, 4, 4),  # 0.96
    (64, 4096, 1536, 1): FewRows(64, 128, 1, 4, 4),  # 0.91
    (64, 4096, 4096, 8): Stream(64, 1, 64),  # 0.96
    (64, 4096, 12288, 8): Stream(64, 1, 64),  # 1.05
    (64, 6144, 4096, 8): Stream(64, 1, 64),  # 0.94
    (64, 24576, 4096, 8): Stream(64, 1, 64),  # 1.01
    (64, 151936, 4096, 8): Stream(64, 1, 64),  # 1.02
    (64, 128, 2048, 8): FewRows(16, 256, 8, 4, 2),  # 1.77
    (64, 2048, 4096, 8): Stream(64, 1, 64, 4),  # 1.27, and 4% more on an H200
    (64, 5120, 2048, 8): Stream(64, 1, 128),  # 0.86, and 3% more on an H200
    (128, 4096, 4096, 8): Stream(64, 1, 64),  # 0.96
    (128, 4096, 12288, 8): Stream(64, 1, 64),  # 0.98
    (128, 6144, 4096, 8): Stream(64, 1, 128),  # 0.92
    (128, 24576, 4096, 8): Stream(64, 1, 64),  # 1.01
    (256, 128, 2048, 8): Stream(32, 4, 64),  # 1.52
    (256, 5120, 2048, 8): ManyRows(192, Stream(64, 1, 64)),
    (256, 4096, 4096, 8): Stream(64, 1, 128),  # 1.01
    (256, 4096, 12288, 8): Stream(64, 1, 128),  # 1.09
    (256, 6144, 4096, 8): ManyRows(192, Stream(64, 1, 128, 2)),  # 0.85 of 256 rows; streamed 0.79
    (256, 24576, 4096, 8): ManyRows(192, Stream(64, 1, 128)),  # 0.92 of 256 rows; streamed 0.88
}
"""(rows padded to a power of two, N, K, leaves) -> plan, with cuBLAS time / its time (at 16 rows: the mean of M = 1 and 16)."""


def padded_rows(M: int) -> int:
    """Rounds a number of rows up to a key of TABLE."""
    return max(16, 1 << (M - 1).bit_length())


def stream_plan(M: int, N: int, multiprocessors: int) -> Stream:
    """Chooses a plan for a shape that TABLE does not have: no split (parking costs more than an idle block) but of a
    last wave that is less than half full; tokens by 64 at most; rows of a tile for the fewest idle blocks."""
    BN = min(64, padded_rows(M))

    def waste(rows: int) -> float:
        items = -(-N // rows) * -(-M // BN)
        return -(-items // multiprocessors) * multiprocessors / items * (1.0 if rows == 128 else 1.1)

    rows = min((128, 64), key=waste)
    items = -(-N // rows) * -(-M // BN)
    return Stream(BN, 1, rows, 2 if M > 128 and multiprocessors < items <= 1.5 * multiprocessors else 1)
