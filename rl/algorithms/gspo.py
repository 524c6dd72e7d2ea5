"""Implements GSPO (Zheng et al. 2025, arXiv 2507.18071): GRPO's advantages, and the policy ratio of a whole sequence.

No KL term there; `kl_coef` adds one. `loss_mean=sequence` is the paper's; any other weighs the same rows otherwise.
"""

from typing import Literal

from pydantic import Field

from rl.algorithms.grpo import GroupSection, Grpo
from trainer.loss import SequencePolicyLoss


class GspoSection(GroupSection):
    """Holds the keys of GSPO."""

    name: Literal["gspo"] = Field(description="the algorithm; algorithm=NAME chooses it, with its values")


class Gspo(Grpo):
    """Weighs each sample as GRPO does, and clips by sequences."""

    clipped = SequencePolicyLoss
