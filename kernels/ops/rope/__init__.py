"""Rotary position embedding (Su et al. 2021, section 3.2), halves convention of Hugging Face."""

import math
from dataclasses import dataclass

import torch

from kernels.device import UnsupportedError, same_device


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of low frequencies (rope_type "llama3" of Hugging Face configs): wavelengths above
    original_positions / low are `factor` times as long, those below original_positions / high stay, and between them the
    frequency is interpolated linearly in original_positions / wavelength."""

    factor: float
    low: float
    high: float
    original_positions: int

    def __call__(self, frequency: torch.Tensor) -> torch.Tensor:
        turns = self.original_positions * frequency / (2 * math.pi)  # within the original context
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


def rope_table(
    positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosine, sine), float32 [positions, head_dim / 2], of position * theta^(-2 i / head_dim), the frequencies scaled by
    `scaling`; computed in float64 on the CPU and rounded once, so every device reads the same bits."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if scaling:
        frequency = scaling(frequency)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
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
