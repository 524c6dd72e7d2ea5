"""CPU truncation: see cpu.c."""

import torch

from kernels.cpu import call


def weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    out = torch.empty(logits.shape, dtype=torch.int64)
    call("truncation_weights", logits.contiguous(), temperature.contiguous(), out, *logits.shape)
    return out
