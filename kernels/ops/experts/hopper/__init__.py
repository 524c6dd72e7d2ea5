"""GPU experts: which kernel runs. Each has the same order, one chain of 16-wide steps, so the choice decides no bit."""

import torch

from kernels.gpu.hopper.ring import BK, reachable
from kernels.ops.dispatch import Slots
from kernels.ops.dispatch.portable import gather
from kernels.ops.experts import STRIPE, TILE, portable
from kernels.ops.experts.hopper import many_rows
from kernels.ops.matmul.hopper import grouped
from kernels.ops.swiglu.portable import forward as swiglu


def align_of(tokens: int) -> int:
    """Returns the number of rows that an expert's are padded to: a block's, about as many as an expert has where each token
    has one in sixteen."""
    return portable.align_of(tokens) if tokens <= 768 else TILE


def _many(a: torch.Tensor, b: torch.Tensor, slots: Slots, extent: int, width: int) -> bool:
    portable.check(a, b)
    fits = extent % BK == 0 and width % 8 == 0 and reachable(a) and reachable(b)
    return slots.align == TILE and fits


def product(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Multiplies each expert's rows of x [capacity, K] by its part of w [experts * N, K]: -> [capacity, N]."""
    if _many(x, w, slots, x.shape[1], w.shape[0] // slots.experts):
        return many_rows.product(x, w, slots)
    return portable.product(x, w, slots)


def gated(x: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Gathers x [T, K], multiplies by gate and up, and returns silu(gate) up [capacity, N / 2]."""
    if _many(x, w, slots, x.shape[1], w.shape[0] // slots.experts):
        return swiglu(many_rows.product(gather(x, slots), w, slots), STRIPE)
    return portable.gated(x, w, slots)


def input_gradient(dy: torch.Tensor, w: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Multiplies rows by their experts' matrices: dy [capacity, N], w [experts * N, K] -> [capacity, K]."""
    if _many(dy, w, slots, dy.shape[1], w.shape[1]):
        return many_rows.product(dy, w, slots, b_mn=True)
    return portable.input_gradient(dy, w, slots)


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Computes float32 [experts * N, K]: a sum over rows, one leaf for each group of tokens."""
    portable.check(dy, x)
    if not (reachable(dy) and reachable(x)):
        return portable.weight_gradient(dy, x, slots)
    dw = dy.new_empty(slots.experts * dy.shape[1], x.shape[1], dtype=torch.float32)
    grouped.launch(dy, x, slots.bounds, dw)
    return dw
