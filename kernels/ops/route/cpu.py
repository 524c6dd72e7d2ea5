"""CPU router: see cpu.c."""

import torch

from kernels.cpu import call


def _lanes(experts: int) -> int:
    return 1 << (experts - 1).bit_length()


def forward(logits: torch.Tensor, k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the k largest logits of each row [T, E] and weighs them by softmax, `normalize`d or not: -> ids int32 and
    weights float32 [T, k]."""
    rows, experts = logits.shape
    W = _lanes(experts)
    ids, weights = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k)
    call("route", logits, ids, weights, torch.empty(rows, 2 * W), rows, experts, W, k, int(normalize))
    return ids, weights


def backward(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, d_weights: torch.Tensor, normalize: bool
) -> torch.Tensor:
    """Computes the gradient to the logits, float32 [T, E], from that to the weights."""
    rows, experts = logits.shape
    W = _lanes(experts)
    d_logits = torch.empty(rows, experts)
    given = (logits.contiguous(), ids, weights, d_weights, d_logits, torch.empty(rows, 2 * W))
    call("route_backward", *given, rows, experts, W, ids.shape[1], int(normalize))
    return d_logits
