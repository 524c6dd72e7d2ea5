"""Distillation: its formula in float64, and the keys that do not combine with it."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms import open_algorithm
from rl.algorithms.algorithm import FrozenAsked
from rl.algorithms.distillation import DistillationSection
from rl.errors import UserError
from tests.rl.algorithms.groups import PLAIN, group
from tests.rl.algorithms.test_regularisers import SIZES, drawn_groups
from trainer.loss import PolicyLoss


def section(**more: Any) -> DistillationSection:
    keys = {"name": "distillation", "prompts_per_step": 1, "group_size": 1, "teacher": "there", "loss_mean": "token"}
    return DistillationSection.model_validate(keys | {"clip_low": 0.2, "clip_high": 0.2} | PLAIN | more)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=SIZES, seed=st.integers(0, 999))
def test_its_formula(sizes: list[list[int]], seed: int) -> None:
    """The advantage of a token is log teacher - log sampler, whatever the rewards are."""
    groups, d, teacher = drawn_groups(sizes, seed)
    algorithm = open_algorithm(section(), 9)
    batch = algorithm.batch(groups, teacher)
    np.testing.assert_array_equal(batch.advantages, (-d).astype(np.float32))
    np.testing.assert_array_equal(batch.weights, np.full(len(d), 1 / max(1, len(d)), dtype=np.float32))
    assert algorithm.loss == PolicyLoss(0.2, 0.2) and (batch.reference == teacher).all()


def test_samples_without_a_reward_teach_too() -> None:
    """Unless they were cut off and that is asked for."""
    groups = [group([[2], [3]], [None, None]), group([[2]], [1.0], end="length")]
    teacher = np.zeros(7, dtype=np.float32)
    assert open_algorithm(section(), 9).batch(groups, teacher).advantages.tolist() == [0.5] * 7
    masked = open_algorithm(section(mask_overlong=True), 9).batch(groups, teacher)
    assert (
        masked.advantages.tolist() == [0.5] * 5 + [0] * 2 and masked.weights.tolist() == [np.float32(0.2)] * 5 + [0] * 2
    )


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"teacher": None}, "algorithm.teacher is null: set it to the model directory"),
        ({"kl_coef": 0.5}, "algorithm.kl_coef=0.5 with algorithm=distillation"),
        ({"sampling_rounds": 2}, "algorithm.sampling_rounds=2 with algorithm=distillation"),
        ({"overlong_buffer": 3}, "algorithm.overlong_buffer=3 with algorithm=distillation"),
    ],
)
def test_keys_that_do_not_combine(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        section(**keys).check(9)
    section().check(9)
    assert section().frozen == FrozenAsked("algorithm.teacher", "there")
