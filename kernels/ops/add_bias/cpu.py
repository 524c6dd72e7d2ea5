"""CPU add_bias: one IEEE addition and one rounding an element, which torch's own op is."""

import torch


def forward(root: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Adds bias [N] to the float32 root [T, N] of a matmul and rounds once to `dtype`."""
    return (root + bias.float()).to(dtype)
