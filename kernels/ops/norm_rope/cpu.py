"""CPU norm_rope: the norm, then rope (see cpu.c), and the table that every device reads."""

import torch

from kernels.cpu import call
from kernels.device import UnsupportedError
from kernels.ops.rms_norm import cpu as rms_norm
from kernels.ops.store_rows import cpu as store_rows


def cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the float32 nearest to cos and sin of float64 angles."""
    cosine, sine = torch.empty(angles.shape), torch.empty(angles.shape)
    call("cos_sin_table", angles.contiguous(), cosine, sine, angles.numel())
    return cosine, sine


def rotate(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, positions: torch.Tensor, sign: float
) -> torch.Tensor:
    """Turns the heads of x [T, heads, head_dim] by `sign` times the angles of their positions."""
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < min(len(cosine), len(sine)):
        raise UnsupportedError(f"rope: positions up to {int(positions.max())} against a table of {len(cosine)}")
    x32 = x.float().contiguous()
    y = torch.empty_like(x32)
    call("rope", x32, cosine, sine, positions, y, *x.shape, sign)
    return y.to(x.dtype)


def forward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    kv_heads: int,
    stored: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms the heads of x [T, H + KV, D] where `weights` are given, then rotates them: -> q [T, H, D], k [T, KV, D]. `stored`
    (keys, values, slots, new values): where k and the values go too."""
    parts = [x[:, : x.shape[1] - kv_heads], x[:, x.shape[1] - kv_heads :]]
    if weights is not None:
        parts = [rms_norm.forward(part, weight, eps) for part, weight in zip(parts, weights, strict=True)]
    q, k = (rotate(part, *table, positions, 1.0) for part in parts)
    if stored is not None:
        keys, values, slots, new_values = stored
        store_rows.store(keys, values, slots, k, new_values)
    return q, k


def backward(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    table: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Returns (dx in the dtype of x; each head's contribution to the gradients of the weights, float32 [T, heads, head_dim] and
    [T, kv_heads, head_dim])."""
    turned = [rotate(dy, *table, positions, -1.0) for dy in (dq, dk)]
    if weights is None:
        return torch.cat(turned, 1), None
    parts = x.split((dq.shape[1], dk.shape[1]), 1)
    (dx_q, q_rows), (dx_k, k_rows) = (
        rms_norm.backward(part, weight, dy, eps) for part, weight, dy in zip(parts, weights, turned, strict=True)
    )
    return torch.cat([dx_q, dx_k], 1), (q_rows, k_rows)
