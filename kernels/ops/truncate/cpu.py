"""CPU truncation: a sort, and sums along it; the integers are of cpu.c."""

import torch

from kernels.cpu import call


def weights(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Computes e^(z - max z) of z = logits / temperature as integers in units of 2^-40: -> int64 [R, V]."""
    out = torch.empty(logits.shape, dtype=torch.int64)
    call("truncation_weights", logits.contiguous(), temperature.contiguous(), out, *logits.shape)
    return out


def kept(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Marks the tokens that the filters keep with 1: -> uint8 [R, V]. The most likely one always stays."""
    order = logits.sort(dim=1, descending=True, stable=True).indices
    weight = weights(logits, temperature).gather(1, order)
    upto = weight.cumsum(1)
    place = torch.arange(logits.shape[1])
    last = torch.where(top_k == 0, logits.shape[1], top_k).clamp(1, logits.shape[1])[:, None] - 1
    share = top_p.double()[:, None] * upto.gather(1, last).double()
    passes = place <= last
    passes &= ((upto - weight).double() < share) | (top_p >= 1)[:, None]
    passes &= weight.double() >= (min_p.double() * float(1 << 40))[:, None]
    passes |= place == 0
    return torch.zeros_like(weight, dtype=torch.uint8).scatter_(1, order, passes.to(torch.uint8))
