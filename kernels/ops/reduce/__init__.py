"""Sums over rows on the tree, and sums of squares."""

import torch

from kernels.device import UnsupportedError, same_device


def sum_rows(x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Computes y[i] = tree over groups of sum_{groups[g] <= r < groups[g + 1]} x[r, i], the rows of a group in the
    device's order: one ascending chain on a CPU, 128 lanes counted from the group's first row on a GPU.

    x float32 [R, n], groups int64 [G + 1] -> float32 [n]. `groups` must end at R: a GPU does not check, as that would wait.
    """
    _check("sum_rows", x)
    return same_device("reduce", x).sum_rows(x, groups)


def fold_rows(x: torch.Tensor) -> torch.Tensor:
    """Computes y[i] = tree over r of x[r, i], every row a leaf; no element -0. x float32 [R, n], R > 0 -> float32 [n]."""
    _check("fold_rows", x)
    return same_device("reduce", x).fold_rows(x)


def _check(op: str, x: torch.Tensor) -> None:
    if x.dtype != torch.float32 or x.dim() != 2:
        raise UnsupportedError(f"{op}: {x.dtype} {tuple(x.shape)} must be float32 [rows, n]")


def square_rows(x: torch.Tensor) -> torch.Tensor:
    """Computes y[r] = sum_i x[r, i]^2 in row order; x float32 [R, n] -> float32 [R]. Invariant to the number of rows."""
    return same_device("reduce", x).square_rows(x)
