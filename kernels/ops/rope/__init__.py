"""Rotary position embedding (Su et al. 2021, section 3.2), halves convention of Hugging Face."""

import math
from dataclasses import dataclass

import torch

from kernels.device import UnsupportedError, same_device
from kernels.ops.rope import cpu as host
from kernels.scalars import root_of_power


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of low frequencies (rope_type "llama3" of Hugging Face configs): wavelengths above
    original_positions / low are `factor` times as long, those below original_positions / high stay, and between them the
    frequency is interpolated linearly in original_positions / wavelength."""

    factor: float
    low: float
    high: float
    original_positions: int

    def __call__(self, frequency: float) -> float:
        """In float64, one IEEE 754 operation after another."""
        turns = self.original_positions * frequency / (2 * math.pi)  # within the original context
        kept = min(max((turns - self.low) / (self.high - self.low), 0.0), 1.0)
        return frequency * (kept + (1 - kept) / self.factor)


def rope_table(
    positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosine, sine), float32 [positions, head_dim / 2] on the CPU, of position * theta^(-2 i / head_dim), the frequencies
    scaled by `scaling`.

    Every device reads the bits that the host made, and every host makes the same: a frequency is the float64 nearest to the
    power, an angle the float64 nearest to the product, and `cos_sin` rounds once.
    """
    frequencies = [root_of_power(theta, i, head_dim) for i in range(0, head_dim, 2)]
    if scaling:
        frequencies = [scaling(f) for f in frequencies]
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return cos_sin(angles)


def cos_sin(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 nearest to cos and sin of float64 angles in 0 .. 2^40, of any shape, on the CPU.

    Computed to 2^-74 of the value: only one that lies closer than that to half-way between two float32 could be rounded the
    other way, and then on every machine. Elementwise: invariant to everything.
    """
    if angles.dtype != torch.float64:
        raise UnsupportedError(f"cos_sin takes angles in float64, got {angles.dtype}")
    return host.cos_sin(angles)


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
