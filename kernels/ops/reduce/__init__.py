"""Sums over rows on the tree, and sums of squares."""

import torch

from kernels.device import UnsupportedError, same_device


def sum_rows(x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """y[i] = tree over groups of sum_{groups[g] <= r < groups[g + 1]} x[r, i], the rows of a group in the device's order: one
    ascending chain on a CPU, 128 lanes counted from the group's first row on a GPU.

    x float32 [R, n], groups int64 [G + 1] -> float32 [n].
    """
    if x.dtype != torch.float32 or int(groups[-1]) != x.shape[0]:
        raise UnsupportedError(f"sum_rows: {x.dtype} rows {x.shape[0]} against groups that end at {int(groups[-1])}")
    return same_device("reduce", x).sum_rows(x, groups)


def square_rows(x: torch.Tensor) -> torch.Tensor:
    """y[r] = sum_i x[r, i]^2 in row order; x float32 [R, n] -> float32 [R]. Invariant to the number of rows."""
    return same_device("reduce", x).square_rows(x)
