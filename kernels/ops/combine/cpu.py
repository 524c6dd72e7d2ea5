"""CPU combine: see cpu.c."""

import torch

from kernels.cpu import call
from kernels.ops.rms_norm import cpu as rms_norm


def forward(
    y: torch.Tensor,
    weights: torch.Tensor,
    of: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    extent: int,
    leaves: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Sums each token's weighted expert rows y [capacity, N], by leaf and up the tree of experts, into `out_dtype` [T, N]."""
    (tokens, k), n, levels = of.shape, y.shape[1], leaves.bit_length()
    out, room = torch.empty(tokens, n), torch.empty(tokens, levels, n)
    given = (y.float(), weights.contiguous(), of, ids.contiguous(), out, room)
    call("combine", *given, tokens, k, n, first, extent, leaves, levels)
    return out.to(out_dtype)


def backward(
    d_out: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients to y, in its dtype, and to the weights, float32 [T, k]."""
    (tokens, k), n = of.shape, y.shape[1]
    d_y, d_weights = torch.zeros(y.shape), torch.empty(tokens, k)
    call("combine_backward", d_out.float(), y.float(), weights.contiguous(), of, d_y, d_weights, tokens, k, n)
    return d_y.to(y.dtype), d_weights


def add_norm(
    y: torch.Tensor,
    weights: torch.Tensor,
    of: torch.Tensor,
    ids: torch.Tensor,
    first: int,
    extent: int,
    leaves: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums as `forward`, adds the sum to x and norms; returns (normed, sum)."""
    return rms_norm.add_forward(x, forward(y, weights, of, ids, first, extent, leaves, y.dtype), weight, eps)
