"""Implements REINFORCE++ (Hu 2025, arXiv 2501.03262) and its variant with a baseline: advantages are normalised over the batch.

The KL term of the paper is `kl_coef` with kl_in=reward: a token is then worth its sample's reward less what it and the tokens
after it lose; without it all tokens of a sample are worth the same. The statistics are over the sampled tokens of the whole
batch, as in the author's OpenRLHF, also where the batch is trained on in several updates.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from rl.algorithms.advantages import Rewards, group_advantages, judged, normalised
from rl.algorithms.algorithm import AlgorithmSection
from rl.algorithms.clipped import Clipped
from rl.algorithms.overlong import shaped
from rl.algorithms.regularisers import penalties, still_to_lose
from rl.algorithms.shares import of_tokens, weighed
from rl.errors import UserError
from rl.samples import Group, sampled_counts
from rl.section import Positive
from trainer.batch import Batch


class ReinforceSection(AlgorithmSection):
    """Holds the keys of REINFORCE++."""

    name: Literal["reinforce_plus_plus"] = Field(
        description="the algorithm; algorithm=NAME chooses it, with its values"
    )
    group_size: Positive
    baseline: Literal["batch", "group"] = Field(
        description="what a reward is compared with before it is normalised over the batch: the batch's mean, or its group's"
    )

    def check(self, max_new_tokens: int) -> None:
        """Raises UserError where keys do not combine."""
        super().check(max_new_tokens)
        if self.baseline == "batch" and self.sampling_rounds > 1:
            raise UserError(
                f"algorithm.sampling_rounds={self.sampling_rounds} with algorithm.baseline=batch: a group whose rewards are "
                f"all equal teaches something there; set algorithm.baseline=group or algorithm.sampling_rounds=1"
            )
        if self.baseline == "group" and self.group_size < 2:
            raise UserError("algorithm.group_size=1 with algorithm.baseline=group: there is nothing to compare with")


class ReinforcePlusPlus(Clipped[ReinforceSection]):
    """Weighs each sample by its reward against those of the whole batch."""

    def batch(
        self, groups: Sequence[Group], reference: np.ndarray | None = None, values: np.ndarray | None = None
    ) -> Batch:
        """Gives every sampled token its advantage, and its share of the mean."""
        counts = sampled_counts([sample.transcript for group in groups for sample in group.samples])
        rewards = shaped(groups, self.section.overlong_buffer, self.max_new_tokens)
        worth = [a for of_group in rewards for a in self._against_baseline(of_group)]
        if lost := penalties(groups, self.section, reference):
            pairs = zip(worth, map(still_to_lose, lost), strict=True)
            each = [None if a is None else a - k for a, rest in pairs for k in rest]
            tokens = np.array(normalised(each, [1] * len(each)), dtype=np.float64)
        else:
            tokens = of_tokens(normalised(worth, counts.tolist()), groups)
        least = 2 if self.section.baseline == "group" else 1
        return weighed(groups, tokens, self.section, self.max_new_tokens, least, reference)

    def _against_baseline(self, rewards: Rewards) -> Rewards:
        """Returns None for what has no reward, or no other to compare it with."""
        if self.section.baseline == "batch":
            return rewards
        if len(judged(rewards)) < 2:
            return [None] * len(rewards)
        centred = group_advantages(rewards, "dr_grpo")
        return [None if r is None else a for r, a in zip(rewards, centred, strict=True)]
