"""Defines the losses of a batch's rows. Elementwise: the sum over rows is the gradient's tree, not a reduction here.

A new loss is a frozen dataclass (it travels to the trainer's ranks) whose call takes the trainer's log-probs and the `LossRows`
of a micro-batch of whole sequences, and returns (loss of each row float32 [R], clipped bool [R]). What combines the rows of a
sequence finds it in `LossRows.sequence`; its sums must have one order (`kernels`), or the cut into micro-batches would show.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.ops import exp


@dataclass(frozen=True)
class LossRows:
    """Holds what a loss sees of a micro-batch beside the trainer's log-probs. All [R], on the trainer's device."""

    logprobs: torch.Tensor  # float32, the sampler's
    advantages: torch.Tensor  # float32
    versions: torch.Tensor  # int64, of the weights that sampled each token
    sequence: torch.Tensor  # int64, the sequence of each row, counted from 0 in the micro-batch


class Loss(Protocol):
    """Computes the loss of each row, before its weight."""

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class PolicyLoss:
    """Computes -min(ratio A, clip(ratio, 1 - low, 1 + high) A) with ratio = exp(logprobs - sampler's) (Schulman et al. 2017,
    equation 7; Yu et al. 2025, "DAPO", equation 10, for high > low).

    On the update that follows sampling the two log-probs are the same bits, so the ratio is exactly 1 and the gradient is
    -A, with no second forward pass for "old" log-probs.
    """

    low: float = 0.2
    high: float = 0.28

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        ratio, up = exp(logprobs - rows.logprobs), rows.advantages >= 0
        clipped = torch.where(up, ratio > 1 + self.high, ratio < 1 - self.low)
        bound = torch.where(up, 1 + self.high, 1 - self.low)
        return -torch.where(clipped, bound, ratio) * rows.advantages, clipped


@dataclass(frozen=True)
class LikelihoodLoss:
    """Computes -log p of each token: the supervised warm start."""

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        return -logprobs, torch.zeros_like(logprobs, dtype=torch.bool)
