"""Implements on-policy distillation (Agarwal et al. 2024, "GKD", arXiv 2306.13649, on the student's own samples, by reverse KL;
Lu and Thinking Machines Lab 2025, "On-Policy Distillation"): a teacher says how likely it finds each sampled token.

GKD differentiates the KL over the whole vocabulary; here, as in the second, the sampled token estimates it: its advantage is
what it takes from the KL, and no token is blamed for what comes after it. Rewards are logged and teach nothing.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from rl.algorithms.algorithm import AlgorithmSection, FrozenAsked
from rl.algorithms.clipped import Clipped
from rl.algorithms.shares import weighed
from rl.errors import UserError
from rl.samples import Group
from rl.section import Folder, Positive
from trainer.batch import Batch


class DistillationSection(AlgorithmSection):
    """Holds the keys of distillation."""

    name: Literal["distillation"]
    group_size: Positive
    teacher: Folder | None = Field(description="model directory of the teacher, of any shape, with the run's tokenizer")

    @property
    def frozen(self) -> FrozenAsked:
        """Returns the teacher."""
        return FrozenAsked("algorithm.teacher", self.teacher, self.device_map)

    def check(self, max_new_tokens: int) -> None:
        """Raises UserError where keys do not combine."""
        if self.teacher is None:
            raise UserError("algorithm.teacher is null: set it to the model directory of the teacher")
        super().check(max_new_tokens)
        if self.kl_coef:
            raise UserError(
                f"algorithm.kl_coef={self.kl_coef:g} with algorithm=distillation: the KL from the teacher is all that it "
                f"trains on; set algorithm.kl_coef=0"
            )
        for key, value, off in (
            ("sampling_rounds", self.sampling_rounds, 1),
            ("overlong_buffer", self.overlong_buffer, 0),
        ):
            if value != off:
                raise UserError(
                    f"algorithm.{key}={value} with algorithm=distillation: no reward is trained on; set algorithm.{key}={off}"
                )


class Distillation(Clipped[DistillationSection]):
    """Weighs each token by how much likelier the teacher finds it than the policy did."""

    def batch(
        self, groups: Sequence[Group], reference: np.ndarray | None = None, values: np.ndarray | None = None
    ) -> Batch:
        """Gives every sampled token the teacher's log-prob less the sampler's, and its share of the mean."""
        assert reference is not None
        tokens = [x for group in groups for s in group.samples for c in s.completions for x in c.logprobs]
        worth = reference.astype(np.float64) - np.array(tokens, dtype=np.float32).astype(np.float64)
        return weighed(groups, worth, self.section, self.max_new_tokens, least=0, reference=reference)
