"""CPU sums: see cpu.c."""

import torch

from kernels.cpu import call
from kernels.device import check_groups


def sum_rows(x: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sums x [T, N] over rows, by group in lanes and up the tree of groups: -> float32 [N]."""
    check_groups("sum_rows", groups, x.shape[0])
    y = torch.empty(x.shape[1])
    call("sum_rows", x.contiguous(), y, x.shape[1], groups, groups.numel() - 1)
    return y


def fold_rows(x: torch.Tensor) -> torch.Tensor:
    """Adds the rows of x [T, N] up the tree, one leaf a row: -> float32 [N]."""
    return sum_rows(x, torch.arange(x.shape[0] + 1))


def square_rows(x: torch.Tensor) -> torch.Tensor:
    """Sums the squares of each row of x [T, N]: -> float32 [T]."""
    y = torch.empty(x.shape[0])
    call("square_rows", x.contiguous(), y, x.shape[0], x.shape[1])
    return y
