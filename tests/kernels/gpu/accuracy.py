"""Distance from float64."""

import torch


def relative_error(got: torch.Tensor, want64: torch.Tensor) -> float:
    """|got - want| / |want|, Euclidean norms."""
    return float((got.double() - want64).norm() / want64.norm())
