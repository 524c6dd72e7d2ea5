"""dW of every expert: the grouped matmul of ops/matmul/hopper/grouped.py with the rows of each expert as a sum of its own."""

import torch

from kernels.gpu.hopper.ring import reachable
from kernels.ops.dispatch import Slots
from kernels.ops.matmul.hopper import grouped
from kernels.ops.matmul.portable import order


def weights(dy: torch.Tensor, x: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Sums dy^T x over each expert's rows: dy [capacity, N], x [capacity, K] -> float32 [experts * N, K]."""
    N, K = dy.shape[1], x.shape[1]
    dw = dy.new_empty(slots.experts * N, K, dtype=torch.float32)
    if reachable(dy) and reachable(x):
        grouped.launch(dy, x, slots.bounds, dw)
        return dw
    for e, bounds in enumerate(slots.bounds.tolist()):  # shapes of tests: slowly, and asking the device
        first, end, part = bounds[0], bounds[-1], dw[e * N : (e + 1) * N]
        offsets = [b - first for b in bounds]
        part.copy_(order.contract(dy[first:end].T, x[first:end].T, offsets) if end > first else part.new_zeros(N, K))
    return dw
