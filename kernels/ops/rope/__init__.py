"""Rotary position embedding (Su et al. 2021, section 3.2), halves convention of Hugging Face."""

import torch

from kernels.device import UnsupportedError, same_device


def rope_table(positions: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosine, sine), float32 [positions, head_dim / 2], of position * theta^(-2 i / head_dim); computed in float64 on the
    CPU and rounded once, so every device reads the same bits."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * theta**-exponent
    return angle.cos().float(), angle.sin().float()


def rope(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of each head, rounded once to the dtype of x.

    x [T, heads, head_dim]; cosine, sine [P, head_dim / 2] from `rope_table`; positions int32 [T], each below P.
    Elementwise: invariant to everything.
    """
    if x.dim() != 3 or x.shape[2] != 2 * cosine.shape[1]:
        raise UnsupportedError(f"rope: x {tuple(x.shape)} against a table for head_dim {2 * cosine.shape[1]}")
    return _Rope.apply(x, cosine, sine, positions)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cosine, sine, positions):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cosine, sine, positions)
        return same_device("rope", x, cosine, positions).rotate(x, cosine, sine, positions, 1.0)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        cosine, sine, positions = ctx.saved_tensors
        return same_device("rope", dy).rotate(dy, cosine, sine, positions, -1.0), None, None, None
