"""What configs/algorithm chooses: the loss, and the advantages, of each."""

import re
from typing import get_args

import numpy as np
import pytest

from rl.algorithms import open_algorithm
from rl.compose import CONFIGS, ROOT, check
from rl.config import RunConfig
from tests.rl.algorithms.groups import group
from trainer.loss import PolicyLoss, SequencePolicyLoss, WeightedLikelihoodLoss

LOSSES = {
    "grpo": PolicyLoss(0.2, 0.28),
    "dapo": PolicyLoss(0.2, 0.28),
    "dr_grpo": PolicyLoss(0.2, 0.2),
    "reinforce_plus_plus": PolicyLoss(0.2, 0.2),
    "gspo": SequencePolicyLoss(3e-4, 4e-4),
    "cispo": WeightedLikelihoodLoss(1.0, 4.0),
    "distillation": PolicyLoss(0.2, 0.2),
    "ppo": PolicyLoss(0.2, 0.2),
}


def test_all_are_here() -> None:
    assert {path.stem for path in (CONFIGS / "algorithm").glob("*.yaml")} == set(LOSSES)


def test_the_page_has_every_algorithm_and_every_key() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text()
    sections = get_args(RunConfig.model_fields["algorithm"].annotation)
    keys = {key for section in sections for key in section.model_fields}
    for word in (*LOSSES, *keys - {"name", "prompts_per_step", "group_size"}, "lr_schedule", "lr_warmup_steps"):
        assert re.search(rf"[`.=]{word}\b", page), word


@pytest.mark.parametrize("name", LOSSES)
def test_its_loss_and_a_batch_of_it(name: str) -> None:
    (config,) = check([f"algorithm={name}"])
    algorithm = open_algorithm(config.algorithm, 9)
    assert algorithm.loss == LOSSES[name]
    reference = np.float32([0, 0, 0, -1, -1, -1, 0, 0])  # where a frozen model is asked; the sampler's are -0.5
    batch = algorithm.batch(
        [group([[3], [1]], [1.0, 0.0]), group([[2], [2]], [0.0, 1.0])], reference, np.zeros(8, np.float32)
    )
    assert (np.sign(batch.advantages) == np.repeat([1, -1, -1, 1], [3, 1, 2, 2])).all() and (batch.weights > 0).all()
