"""Implements GRPO (Shao et al. 2024): each sample is worth its reward against those of its group.

As there, but with DAPO's clipping and token-mean (Yu et al. 2025), and without a KL term unless `kl_coef` says so. `advantage`
has what Dr. GRPO and RLOO take for it.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from rl.algorithms.advantages import Advantage, group_advantages
from rl.algorithms.algorithm import AlgorithmSection
from rl.algorithms.clipped import Clipped
from rl.algorithms.overlong import shaped
from rl.algorithms.regularisers import less, penalties
from rl.algorithms.shares import of_tokens, weighed
from rl.samples import Group
from trainer.batch import Batch


class GroupSection(AlgorithmSection):
    """Holds the keys of the algorithms that compare a sample with its group."""

    advantage: Advantage = Field(description="what a reward is worth against its group's")


class GrpoSection(GroupSection):
    """Holds the keys of GRPO."""

    name: Literal["grpo"] = Field(description="the algorithm; algorithm=NAME chooses it, with its values")


class Grpo(Clipped[GroupSection]):
    """Weighs each sample by its reward against its group's."""

    def batch(
        self, groups: Sequence[Group], reference: np.ndarray | None = None, values: np.ndarray | None = None
    ) -> Batch:
        """Gives every sampled token of a sample the sample's advantage, and its share of the mean."""
        rewards = shaped(groups, self.section.overlong_buffer, self.max_new_tokens)
        rewards = less(rewards, penalties(groups, self.section, reference))
        worth = [a for of_group in rewards for a in group_advantages(of_group, self.section.advantage)]
        tokens = of_tokens(worth, groups)
        return weighed(groups, tokens, self.section, self.max_new_tokens, reference=reference)
