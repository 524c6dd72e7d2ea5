"""Experts in plain Triton: any card that multiplies bfloat16 in 16-wide tensor-core steps."""

import torch

from kernels.device import UnsupportedError
from kernels.ops.dispatch import Slots
from kernels.ops.experts.portable import few_rows
from kernels.ops.matmul.portable import grouped


def align_of(tokens: int) -> int:
    """Returns the number of rows that an expert's are padded to: a block's, about as many as an expert has where each token
    has one in sixteen."""
    return 16 if tokens <= 128 else 32 if tokens <= 256 else 64


def check(*tensors: torch.Tensor) -> None:
    """Raises UnsupportedError unless a GPU kernel takes these."""
    if any(t.dtype != torch.bfloat16 for t in tensors):
        raise UnsupportedError(f"experts on a GPU take bfloat16, got {[str(t.dtype) for t in tensors]}")


def product(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Multiplies each expert's rows of x [capacity, K] by its part of w [experts * N, K]: -> [capacity, N]."""
    check(x, w)
    return few_rows.product(x.contiguous(), w.contiguous(), slots, tokens=False, gated=False)


def gated(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Gathers x [T, K], multiplies by gate and up, and returns silu(gate) up [capacity, N / 2]."""
    check(x, w)
    return few_rows.product(x.contiguous(), w.contiguous(), slots, tokens=True, gated=True)


def input_gradient(dy: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Multiplies rows by their experts' matrices: dy [capacity, N], w [experts * N, K] -> [capacity, K]."""
    check(dy, w)
    return few_rows.product(dy.contiguous(), w.contiguous(), slots, tokens=False, gated=False, transposed=True)


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Computes float32 [experts * N, K]: a sum over rows, one leaf for each group of tokens."""
    check(dy, x)
    dw = dy.new_empty(slots.experts * dy.shape[1], x.shape[1], dtype=torch.float32)
    grouped.launch_sums(dy, x, slots.bounds, dw)
    return dw
