"""Implements CISPO (MiniMax 2025, "MiniMax-M1", arXiv 2506.13585): GRPO's advantages, and an importance weight that is clipped
and not differentiated, so that a clipped token still teaches.

No KL term there; `kl_coef` adds one. The paper sets no lower bound (clip_low=1) and does not print its upper one: that of
configs/algorithm/cispo.yaml is Khatri et al.'s (2025, "ScaleRL", arXiv 2510.13786).
"""

from typing import Literal

from pydantic import Field

from rl.algorithms.grpo import GroupSection, Grpo
from trainer.loss import WeightedLikelihoodLoss


class CispoSection(GroupSection):
    """Holds the keys of CISPO."""

    name: Literal["cispo"] = Field(description="the algorithm; algorithm=NAME chooses it, with its values")


class Cispo(Grpo):
    """Weighs each sample as GRPO does, and trains on the log-prob under a clipped importance weight."""

    clipped = WeightedLikelihoodLoss
