"""CPU experts: the matmul of each expert's rows, one leaf over k and n, one leaf a group over rows."""

import torch

from kernels.ops.dispatch import Slots
from kernels.ops.dispatch.cpu import gather
from kernels.ops.matmul.cpu import contract
from kernels.ops.swiglu.cpu import forward as swiglu


def align_of(tokens: int) -> int:
    """Returns the rows that an expert's are padded to: none are."""
    return 1


def _each(slots: Slots, w: torch.Tensor):  # type: ignore[no-untyped-def]
    """(first row, end, weight) of every expert that has rows."""
    ends = slots.bounds[:, -1].tolist()
    for e, (first, end, part) in enumerate(zip(slots.starts.tolist(), ends, w.chunk(slots.experts), strict=False)):
        if first < end:
            yield e, first, end, part


def product(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Multiplies each expert's rows of x [capacity, K] by its part of w [experts * N, K]: -> [capacity, N], padding zero."""
    K, N = x.shape[1], w.shape[0] // slots.experts
    y = x.new_zeros(slots.capacity, N)
    for _, first, end, part in _each(slots, w):
        y[first:end] = contract(x[first:end], part, [0, K], x.dtype)
    return y


def gated(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Gathers x [T, K], multiplies by gate and up, and returns silu(gate) up [capacity, N / 2]."""
    from kernels.ops.experts import STRIPE

    return swiglu(product(gather(x, slots), w, slots), STRIPE)


def input_gradient(dy: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Multiplies dy [capacity, N] by each expert's part of w [experts * N, K]: -> [capacity, K]."""
    N = dy.shape[1]
    dx = dy.new_zeros(slots.capacity, w.shape[1])
    for _, first, end, part in _each(slots, w):
        dx[first:end] = contract(dy[first:end], part.T, [0, N], dy.dtype)
    return dx


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Sums dy^T x over each expert's rows, one leaf a group: -> float32 [experts * N, K]."""
    N, K = dy.shape[1], x.shape[1]
    dw = torch.zeros(slots.experts, N, K)
    for e, first, end, part in _each(slots, dw):
        part[0] = contract(dy[first:end].T, x[first:end].T, slots.bounds[e] - first, torch.float32)
    return dw.view(slots.experts * N, K)
