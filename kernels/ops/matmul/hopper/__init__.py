"""Matmul on Hopper: which kernel runs. Each has the same order, so the choice decides speed and no bit
(tests/kernels/gpu/test_matmul.py).

portable/few_rows.py  decoding: bound by the weight's bytes, several blocks a multiprocessor; and what no other takes
weight_stream.py      the same and some hundred rows: one block a multiprocessor, a ring that never drains
many_rows.py          training and prefill: bound by the tensor cores; K- or row-contiguous operands, equal leaves
grouped.py            dW: leaves are groups of tokens at any offsets
portable/grouped.py   the same for operands that TMA cannot read
"""

import torch

from kernels.gpu.card import card_of
from kernels.gpu.hopper.ring import BK, reachable
from kernels.ops.matmul import portable
from kernels.ops.matmul.hopper import grouped, many_rows, weight_stream
from kernels.ops.matmul.hopper.tuning import TABLE, ManyRows, padded_rows, stream_plan
from kernels.ops.matmul.portable import few_rows
from kernels.ops.matmul.portable.plans import FewRows

MOST_STREAMED = 256
"""Rows above which many_rows.py is faster."""


def contract(
    a: torch.Tensor, b: torch.Tensor, bounds: list[int] | torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """Computes what `portable.contract` says, and takes."""
    (M, K), N = a.shape, b.shape[0]
    if a.dtype != torch.bfloat16 or M == 0 or K == 0:
        return portable.contract(a, b, bounds, out_dtype)
    if isinstance(bounds, torch.Tensor):
        return _grouped(a, b, bounds, out_dtype)
    leaves, extent = len(bounds) - 1, bounds[1]
    contiguous = a.stride(1) == 1 and b.stride(1) == 1
    ring = leaves in (1, 2, 4, 8) and extent % BK == 0 and reachable(a)
    plan = TABLE.get((padded_rows(M), N, K, leaves))
    few = M <= MOST_STREAMED
    if isinstance(plan, ManyRows):
        few, plan = plan.above >= M, plan.below
    if contiguous and few:
        if isinstance(plan, FewRows):
            return few_rows.contract(a, b, leaves, out_dtype, **plan._asdict())
        if ring and reachable(b) and (M > 64 or leaves > 1):
            stream = plan or stream_plan(M, N, card_of(a.device).multiprocessors)
            return weight_stream.contract(a, b, leaves, out_dtype, **stream._asdict())
        return portable.contract(a, b, bounds, out_dtype)
    b_mn = b.stride(1) != 1
    stored = out_dtype == torch.float32 or (out_dtype == torch.bfloat16 and N % 8 == 0)
    if ring and stored and reachable(b.T if b_mn else b):
        y = a.new_empty(M, N, dtype=out_dtype)
        wide = leaves == 1 and not b_mn and M > 512 and N % 256 == 0
        many_rows.launch(a, b.T if b_mn else b, y, M, N, leaves, b_mn=b_mn, BN=256 if wide else 128)
        return y
    return portable.contract(a, b, bounds, out_dtype)


def _grouped(a: torch.Tensor, b: torch.Tensor, bounds: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    if not (reachable(a.T) and reachable(b.T)):
        return portable.contract(a, b, bounds, out_dtype)
    y = a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32)
    grouped.launch(a.T, b.T, bounds, y)
    return y.to(out_dtype)
