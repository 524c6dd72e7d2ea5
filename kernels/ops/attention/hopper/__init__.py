"""Attention on Hopper: one row order (portable/rows.py) in three forward kernels, and a backward without atomics."""

import torch

from kernels.gpu.launch import heads_contiguous
from kernels.ops.attention import Pages
from kernels.ops.attention.hopper import packed, packed_gradient
from kernels.ops.attention.portable import check, decode, gradient, prefill
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
    check(q, keys, values, scale)
    T, heads, D = q.shape
    q, keys, values = map(heads_contiguous, (q, keys, values))
    out, lse = q.new_empty(T, heads, D), q.new_empty(T, heads, dtype=torch.float32)
    if T:
        c = scale * LOG2_E
        tma = D in (64, 128) and all(map(_reachable, (q, keys, values))) and KEY_BLOCK == 128
        if pages.starts.numel() - 1 == T and not pages.packed:
            decode.launch(q, keys, values, pages, out, lse, c, KEY_BLOCK, KEY_SPLIT)
        elif tma and packed.readable(pages):
            packed.launch(q, keys, values, pages, out, lse, c, KEY_SPLIT)
        else:
            prefill.launch(q, keys, values, pages, out, lse, c, KEY_BLOCK, KEY_SPLIT)
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
    q, keys, values = map(heads_contiguous, (q, keys, values))
    d_out = d_out.to(q.dtype).contiguous()
    if not len(q):
        return torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)
    if q.shape[2] in packed_gradient.HEAD_DIMS:
        q, keys, values, d_out = (
            t if _reachable(t) else t.clone(memory_format=torch.contiguous_format) for t in (q, keys, values, d_out)
        )
        run = packed_gradient.launch
    else:
        run = gradient.launch
    return run(q, keys, values, out, lse, d_out, starts, scale, scale * LOG2_E)
