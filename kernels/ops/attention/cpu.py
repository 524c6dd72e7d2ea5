"""CPU attention: see cpu.c."""

import torch

from kernels.cpu import call
from kernels.ops.attention import Pages
from kernels.scalars import LOG2_E
from kernels.tree import KEY_BLOCK, KEY_SPLIT


def forward(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (out in the dtype of q, base-2 log-sum-exp of each row in float32 [T, heads])."""
    T, heads, head_dim = q.shape
    out, lse = torch.empty(T, heads, head_dim), torch.empty(T, heads)
    call(
        "attention",
        *(t.float().contiguous() for t in (q, keys, values)),
        *(t.contiguous() for t in (pages.table, pages.sequence, pages.position)),
        out,
        lse,
        *(T, pages.table.shape[1], pages.size, heads, keys.shape[1], head_dim, KEY_BLOCK, KEY_SPLIT),
        scale * LOG2_E,
    )
    return out.to(q.dtype), lse


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
    """Computes the gradients to q, keys and values, in their shapes and dtypes, from d_out and what the forward pass saved."""
    (_, heads, head_dim), kv_heads = q.shape, keys.shape[1]
    wide = [t.float().contiguous() for t in (q, keys, values, out, lse, d_out)]
    d_q, d_k, d_v = (torch.empty_like(wide[i]) for i in range(3))
    sizes = (starts.numel() - 1, heads, kv_heads, head_dim)
    call("attention_backward", *wide, starts, d_q, d_k, d_v, *sizes, scale, scale * LOG2_E)
    return d_q.to(q.dtype), d_k.to(keys.dtype), d_v.to(values.dtype)
