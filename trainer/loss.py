"""Losses over response tokens. Elementwise: the sum over tokens is the gradient's tree, not a reduction here."""

from dataclasses import dataclass
from typing import Literal

import torch

from kernels.ops import exp

Objective = Literal["policy", "likelihood"]


@dataclass(frozen=True)
class Clip:
    """The policy ratio's range 1 - low .. 1 + high (Yu et al. 2025, "DAPO", equation 10, for high > low)."""

    low: float = 0.2
    high: float = 0.28


def policy_loss(
    logprobs: torch.Tensor, rollout: torch.Tensor, advantages: torch.Tensor, clip: Clip
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, clipped) of each token, float32 and bool [R]: -min(ratio A, clip(ratio, 1 - low, 1 + high) A) with
    ratio = exp(logprobs - rollout) (Schulman et al. 2017, equation 7).

    On the update that follows sampling the two log-probs are the same bits, so the ratio is exactly 1 and the gradient is
    -A, with no second forward pass for "old" log-probs.
    """
    ratio = exp(logprobs - rollout)
    clipped = torch.where(advantages >= 0, ratio > 1 + clip.high, ratio < 1 - clip.low)
    bound = torch.where(advantages >= 0, 1 + clip.high, 1 - clip.low)
    return -torch.where(clipped, bound, ratio) * advantages, clipped


def likelihood_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """-log p of each token: the supervised warm start."""
    return -logprobs
