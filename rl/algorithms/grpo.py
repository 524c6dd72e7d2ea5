"""Implements GRPO (Shao et al. 2024): each sample is worth its reward against those of its group.

As there, but without a KL term or a reference model, and with DAPO's clipping (Yu et al. 2025).
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from rl.algorithms.algorithm import AlgorithmSection
from rl.pack import pack
from rl.samples import Group, sampled_counts
from trainer.batch import Batch
from trainer.loss import PolicyLoss

Advantage = Literal["grpo", "dr_grpo", "rloo"]
LossMean = Literal["token", "sequence", "constant"]


class GrpoSection(AlgorithmSection):
    """Holds the keys of GRPO."""

    name: Literal["grpo"] = Field(description="one of rl/algorithms")
    advantage: Advantage = Field(description="what a reward is worth against its group's")
    loss_mean: LossMean = Field(
        description="over what the loss is a mean: all tokens, each sequence's own, or a constant"
    )
    clip_low: float = Field(ge=0, le=1, description="the policy ratio is clipped below 1 - clip_low")
    clip_high: float = Field(ge=0, description="and above 1 + clip_high")


class Grpo:
    """Weighs each sample by its reward against its group's."""

    def __init__(self, section: GrpoSection, max_new_tokens: int) -> None:
        self.section, self.max_new_tokens = section, max_new_tokens
        self.loss = PolicyLoss(section.clip_low, section.clip_high)

    def batch(self, groups: Sequence[Group]) -> Batch:
        """Gives every sampled token of a sample the sample's advantage, and its share of the mean."""
        transcripts = [sample.transcript for group in groups for sample in group.samples]
        worth: list[float] = []
        for group in groups:
            judged = iter(advantages([r for r in group.rewards if r is not None], self.section.advantage))
            worth += [0.0 if r is None else next(judged) for r in group.rewards]
        kept = np.array([r is not None for group in groups for r in group.rewards])
        counts = sampled_counts(transcripts)
        shares = (kept / loss_counts(counts, self.section.loss_mean, self.max_new_tokens)).astype(np.float32)
        return pack(transcripts, np.repeat(np.array(worth, dtype=np.float32), counts), np.repeat(shares, counts))


def advantages(rewards: Sequence[float], kind: Advantage) -> tuple[float, ...]:
    """Computes what each reward of a group is worth, with r the rewards and n their number:

        grpo     (r - mean) / (std + 1e-4), std with n - 1     (Shao et al. 2024, section 4.1.2)
        dr_grpo  r - mean                                      (Liu et al. 2025, "Dr. GRPO", section 3)
        rloo     r - mean of the others                        (Ahmadian et al. 2024, section 3.2)

    Sums are exact (fsum), so the result does not depend on the machine.
    """
    if (n := len(rewards)) < 2:
        return (0.0,) * n  # nothing to compare with
    mean = math.fsum(rewards) / n
    centred = [r - mean for r in rewards]
    if kind == "dr_grpo":
        return tuple(centred)
    if kind == "rloo":
        return tuple(c * n / (n - 1) for c in centred)
    std = math.sqrt(math.fsum(c * c for c in centred) / (n - 1))
    return tuple(c / (std + 1e-4) for c in centred)


def loss_counts(counts: np.ndarray, mean: LossMean, limit: int) -> np.ndarray:
    """Returns the exact count that each sequence's tokens are divided by, int64 [S], at least 1, from its sampled tokens,
    `counts` int64 [S]:

    token     all sampled tokens of the batch            (token-mean; Yu et al. 2025, equation 8)
    sequence  sequences x sampled tokens of its own      (Shao et al. 2024, equation 3)
    constant  sequences x `limit` (max_new_tokens)       (Liu et al. 2025, section 3)
    """
    sequences = len(counts)
    of_mean = {
        "token": np.full(sequences, counts.sum()),
        "sequence": sequences * counts,
        "constant": np.full(sequences, sequences * limit),
    }
    return np.maximum(of_mean[mean], 1)
