"""Matmul of block-scaled FP8 on Hopper: which kernel runs. Both have the same order, so the choice decides speed and no bit
(tests/kernels/gpu/test_matmul_fp8.py).

leaf.py           a leaf of the tree, which both walk
weight_stream.py  few rows: bound by the weight's bytes
many_rows.py      training and prefill: bound by the tensor cores
order.py          the order as it reads, for tests and benchmarks
"""

import torch

from kernels.device import UnsupportedError
from kernels.gpu.hopper.ring import reachable
from kernels.ops.matmul.hopper.tuning import ManyRows
from kernels.ops.matmul_fp8.hopper import many_rows, weight_stream
from kernels.ops.matmul_fp8.hopper.tuning import plan
from kernels.ops.quantize.hopper import column_scales

_MOST_LEAVES = 64
"""Of a tree that weight_stream.py walks: eight blocks of threads, of eight leaves each."""


def contract(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    bounds: list[int],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Computes y [M, N] of x e4m3 [M, K] with scales [M, K / 128] and w [N, K] with [N / 128, K / 128], as
    `kernels.ops.matmul_fp8` says; leaf i is bounds[i] <= k < bounds[i + 1], all of one length.

    Raises UnsupportedError for more than 64 leaves."""
    (M, K), N, leaves = x.shape, w.shape[0], len(bounds) - 1
    if M == 0 or K == 0 or N == 0:
        return torch.zeros(M, N, dtype=out_dtype, device=x.device)
    if leaves > _MOST_LEAVES:
        raise UnsupportedError(f"matmul_fp8 on a GPU: {leaves} leaves are more than {_MOST_LEAVES}: lower model.leaves")
    x, w = (t if reachable(t) else t.contiguous() for t in (x, w))
    w_scales = w_scales if w_scales.stride(1) == 1 else w_scales.contiguous()
    given = x, column_scales(x_scales), w, w_scales, leaves, out_dtype
    chosen = plan(M, N, K, leaves)
    if isinstance(chosen, ManyRows):
        return many_rows.contract(*given)
    return weight_stream.contract(*given, **chosen._asdict())
