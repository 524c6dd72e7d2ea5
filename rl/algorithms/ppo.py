"""Implements PPO (Schulman et al. 2017, arXiv 1707.06347) with a critic and generalised advantages (Schulman et al. 2016,
"GAE", arXiv 1506.02438), a token an action, as in Ouyang et al. 2022 (arXiv 2203.02155).

The critic is a second model with the policy's body and a head of one number, which begins at zero. The reward of a sample comes
at its last token, what `kl_coef` takes from it at each. Advantages are normalised over the tokens of the batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from rl.algorithms.advantages import normalised
from rl.algorithms.algorithm import AlgorithmSection, CriticAsked
from rl.algorithms.clipped import Clipped
from rl.algorithms.overlong import shaped
from rl.algorithms.regularisers import penalties
from rl.algorithms.shares import weighed
from rl.errors import UserError
from rl.samples import Group, sampled_counts
from rl.section import Fraction, Positive
from trainer.batch import Batch
from trainer.loss import ValueLoss


class PpoSection(AlgorithmSection):
    """Holds the keys of PPO."""

    name: Literal["ppo"]
    group_size: Positive
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(description="what remains of a reward that comes a token later")
    gae_lambda: Fraction = Field(description="of generalised advantages: 0 trusts the critic, 1 the rewards")
    value_clip: float = Field(
        ge=0, description="how far the critic's value may move on a batch before it is clipped; 0: any"
    )
    critic_lr: float = Field(
        gt=0, description="learning rate of the critic, at its highest; it goes as trainer.lr does"
    )

    @property
    def critic(self) -> CriticAsked:
        """Returns how the critic is trained."""
        return CriticAsked(ValueLoss(self.value_clip), self.critic_lr)

    def check(self, max_new_tokens: int) -> None:
        """Raises UserError where keys do not combine."""
        super().check(max_new_tokens)
        if self.sampling_rounds > 1:
            raise UserError(
                f"algorithm.sampling_rounds={self.sampling_rounds} with algorithm=ppo: a group whose rewards are all equal "
                f"teaches something there; set algorithm.sampling_rounds=1"
            )


class Ppo(Clipped[PpoSection]):
    """Weighs each token by what it earned more than the critic had expected."""

    def batch(
        self, groups: Sequence[Group], reference: np.ndarray | None = None, values: np.ndarray | None = None
    ) -> Batch:
        """Gives every sampled token its advantage, its return, and its share of the mean."""
        assert values is not None
        counts = sampled_counts([sample.transcript for group in groups for sample in group.samples])
        rewards = [
            r for of_group in shaped(groups, self.section.overlong_buffer, self.max_new_tokens) for r in of_group
        ]
        said = [part.tolist() for part in np.split(values, np.cumsum(counts)[:-1])]
        lost = penalties(groups, self.section, reference) or [[0.0] * n for n in counts.tolist()]
        found: list[float] = []
        for reward, mine, of_tokens in zip(rewards, said, lost, strict=True):
            found += self._advantages(0.0 if reward is None else reward, mine, of_tokens)
        there = np.repeat([r is not None for r in rewards], counts).tolist()
        worth = normalised([a if has else None for a, has in zip(found, there, strict=True)], [1] * len(found))
        tokens = np.array(worth, dtype=np.float64)
        batch = weighed(groups, tokens, self.section, self.max_new_tokens, 1, reference)
        returns = np.array(found, dtype=np.float64) + values.astype(np.float64)
        return replace(batch, values=values, returns=returns.astype(np.float32))

    def _advantages(self, reward: float, values: Sequence[float], lost: Sequence[float]) -> list[float]:
        """Computes A[t] = d[t] + gamma lambda A[t + 1], d[t] = r[t] + gamma V[t + 1] - V[t] (Schulman et al. 2016, equations
        12 and 16), from the last token back, where V and A of what follows are 0: one order, in float64."""
        gamma, decay = self.section.gamma, self.section.gamma * self.section.gae_lambda
        out: list[float] = []
        value_after = advantage = 0.0
        for value, less in zip(reversed(values), reversed(lost), strict=True):
            earned = (0.0 if out else reward) - less
            advantage = (earned + gamma * value_after - value) + decay * advantage
            out.append(advantage)
            value_after = value
        return out[::-1]
