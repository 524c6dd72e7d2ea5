"""CPU norm_rope: the two ops one after the other."""

import torch

from kernels.ops.rms_norm import cpu as rms_norm
from kernels.ops.rope import cpu as rope


def forward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [x[:, : x.shape[1] - kv_heads], x[:, x.shape[1] - kv_heads :]]
    if weights is not None:
        parts = [rms_norm.forward(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]
    q, k = (rope.rotate(part, *table, positions, 1.0) for part in parts)
    return q, k
