"""Matmul in plain Triton: any card that multiplies bfloat16 in 16-wide tensor-core steps.

few_rows.py  up to 256 rows, any strides: forward and dX
grouped.py   more rows, and dW, whose leaves are groups of tokens at any offsets
order.py     the order as it reads, for tests and benchmarks
"""

import torch

from kernels.device import UnsupportedError
from kernels.gpu.card import card_of
from kernels.ops.matmul.portable import few_rows, grouped
from kernels.ops.matmul.portable.plans import few_rows_plan


def contract(
    a: torch.Tensor, b: torch.Tensor, bounds: list[int] | torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Sums y[m, n] = tree over leaves bounds[i] <= k < bounds[i + 1] of sum_k a[m, k] b[n, k]; any strides. A list of bounds is
    that of equal leaves, a power of two.

    A tensor of bounds stays on the device: it must end at the contraction length (unchecked, as a check would wait)."""
    if a.dtype != torch.bfloat16:
        raise UnsupportedError(f"matmul on a GPU takes bfloat16, got {a.dtype}: set the model's dtype to bfloat16")
    (M, K), N = a.shape, b.shape[0]
    if M == 0 or K == 0:
        return a.new_zeros(M, N, dtype=out_dtype)
    if isinstance(bounds, torch.Tensor):
        y = a.new_empty(M, N, dtype=torch.float32)
        grouped.launch_sums(a.T, b.T, bounds, y)
        return y.to(out_dtype)
    leaves = len(bounds) - 1
    if M > 256:
        return grouped.contract(a, b, leaves, out_dtype)
    plan = few_rows_plan(M, N, leaves, card_of(a.device).multiprocessors)
    return few_rows.contract(a, b, leaves, out_dtype, **plan._asdict())
