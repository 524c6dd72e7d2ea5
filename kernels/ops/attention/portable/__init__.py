"""Attention in plain Triton: one row order (rows.py) in two forward kernels, and a backward without atomics."""

import torch

from kernels.device import UnsupportedError
from kernels.gpu.launch import heads_contiguous
from kernels.ops.attention import Pages
from kernels.ops.attention.portable import decode, gradient, prefill
from kernels.scalars import LOG2_E
from kernels.tree import KEY_BLOCK, KEY_SPLIT


def check(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> None:
    """Raises UnsupportedError unless a GPU kernel takes these, q [T, heads, head_dim]."""
    D = q.shape[2]
    if q.dtype != torch.bfloat16 or keys.dtype != q.dtype or values.dtype != q.dtype:
        raise UnsupportedError(f"attention on a GPU takes bfloat16, got {q.dtype}, {keys.dtype}: set the model's dtype")
    if D & (D - 1) or D > 256:
        raise UnsupportedError(f"attention on a GPU: head_dim {D} must be a power of two between 16 and 256")
    if scale <= 0:
        raise UnsupportedError(f"attention: scale {scale} must be positive (the maximum is taken before it is applied)")


def forward(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out in the dtype of q, base-2 log-sum-exp of each row in float32 [T, heads])."""
    check(q, keys, values, scale)
    T, heads, D = q.shape
    q, keys, values = map(heads_contiguous, (q, keys, values))
    out, lse = q.new_empty(T, heads, D), q.new_empty(T, heads, dtype=torch.float32)
    if T:
        run = decode.launch if pages.starts.numel() - 1 == T and not pages.packed else prefill.launch
        run(q, keys, values, pages, out, lse, scale * LOG2_E, KEY_BLOCK, KEY_SPLIT)
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
    """Returns (d_q, d_k, d_v), each in the dtype of q. The order of a sum depends on head_dim and nothing else."""
    q, keys, values = map(heads_contiguous, (q, keys, values))
    if not len(q):
        return torch.empty_like(q), torch.empty_like(keys), torch.empty_like(values)
    return gradient.launch(q, keys, values, out, lse, d_out.to(q.dtype).contiguous(), starts, scale, scale * LOG2_E)
