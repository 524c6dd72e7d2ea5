"""Attention on Hopper: one row order (portable/rows.py) in three forward kernels, and a backward without atomics."""

import torch

from kernels.gpu.launch import heads_contiguous
from kernels.ops.attention import Pages, portable
from kernels.ops.attention.hopper import packed, packed_gradient
from kernels.scalars import LOG2_E
from kernels.tree import KEY_BLOCK, KEY_SPLIT


def _reachable(t: torch.Tensor) -> bool:
    """Says whether TMA can read `t`, in which heads and head_dim are contiguous."""
    row = t.stride(0)
    return t.data_ptr() % 16 == 0 and row % 8 == 0 and row >= t.shape[1] * t.shape[2]


def forward(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out in the dtype of q, base-2 log-sum-exp of each row in float32 [T, heads])."""
    T, heads, D = q.shape
    decoding = pages.starts.numel() - 1 == T and not pages.packed
    if not T or D not in (64, 128) or decoding or KEY_BLOCK != 128 or not packed.readable(pages):
        return portable.forward(q, keys, values, pages, scale)
    portable.check(q, keys, values, scale)
    q, keys, values = map(heads_contiguous, (q, keys, values))
    if not all(map(_reachable, (q, keys, values))):
        return portable.forward(q, keys, values, pages, scale)
    out, lse = q.new_empty(T, heads, D), q.new_empty(T, heads, dtype=torch.float32)
    packed.launch(q, keys, values, pages, out, lse, scale * LOG2_E, KEY_SPLIT)
    return out, lse


def backward(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (d_q, d_k, d_v), each in the dtype of q. The order of a sum depends on head_dim and nothing else: an
    operand that TMA cannot read is copied first."""
    if not len(q) or q.shape[2] not in packed_gradient.HEAD_DIMS:
        return portable.backward(q, keys, values, out, lse, d_out, starts, scale)
    operands = (*map(heads_contiguous, (q, keys, values)), d_out.to(q.dtype).contiguous())
    q, keys, values, d_out = (t if _reachable(t) else t.clone(memory_format=torch.contiguous_format) for t in operands)
    return packed_gradient.launch(q, keys, values, out, lse, d_out, starts, scale, scale * LOG2_E)
