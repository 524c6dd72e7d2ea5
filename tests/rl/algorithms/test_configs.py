"""What configs/algorithm chooses: the loss, and the advantages, of each."""

import numpy as np
import pytest

from rl.algorithms import open_algorithm
from rl.compose import CONFIGS, check
from tests.rl.algorithms.groups import group
from trainer.loss import PolicyLoss, SequencePolicyLoss, WeightedLikelihoodLoss

LOSSES = {
    "grpo": PolicyLoss(0.2, 0.28),
    "dapo": PolicyLoss(0.2, 0.28),
    "dr_grpo": PolicyLoss(0.2, 0.2),
    "reinforce_plus_plus": PolicyLoss(0.2, 0.2),
    "gspo": SequencePolicyLoss(3e-4, 4e-4),
    "cispo": WeightedLikelihoodLoss(1.0, 4.0),
}


def test_all_are_here() -> None:
    assert {path.stem for path in (CONFIGS / "algorithm").glob("*.yaml")} == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_its_loss_and_a_batch_of_it(name: str) -> None:
    (config,) = check([f"algorithm={name}"])
    algorithm = open_algorithm(config.algorithm, 9)
    assert algorithm.loss == LOSSES[name]
    batch = algorithm.batch([group([[3], [1]], [1.0, 0.0]), group([[2], [2]], [0.0, 1.0])])
    assert (np.sign(batch.advantages) == np.repeat([1, -1, -1, 1], [3, 1, 2, 2])).all() and (batch.weights > 0).all()
