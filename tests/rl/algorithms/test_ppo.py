"""PPO: generalised advantages and returns in float64 by the sums of the paper, and the keys that do not combine."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms import open_algorithm
from rl.algorithms.algorithm import CriticAsked
from rl.algorithms.ppo import PpoSection
from rl.errors import UserError
from tests.rl.algorithms.groups import PLAIN, group
from tests.rl.algorithms.test_regularisers import SIZES, drawn_groups, pieces
from trainer.loss import PolicyLoss, ValueLoss


def section(**more: Any) -> PpoSection:
    keys = {
        "name": "ppo",
        "prompts_per_step": 1,
        "group_size": 1,
        "loss_mean": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
    }
    critic = {"gamma": 1.0, "gae_lambda": 0.95, "value_clip": 0.2, "critic_lr": 0.001}
    return PpoSection.model_validate(keys | critic | PLAIN | more)


def sums(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """A[t] = sum over l of (gamma lambda)^l d[t + l] (Schulman et al. 2016, equation 16)."""
    n = len(rewards)
    d = rewards + gamma * np.append(values[1:], 0) - values
    return np.array([sum((gamma * lam) ** l * d[t + l] for l in range(n - t)) for t in range(n)])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    sizes=SIZES,
    seed=st.integers(0, 999),
    gamma=st.floats(0.5, 1, width=32),
    lam=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    coef=st.sampled_from([0.0, 0.25]),
)
def test_its_formula(sizes: list[list[int]], seed: int, gamma: float, lam: float, coef: float) -> None:
    groups, d, reference = drawn_groups(sizes, seed)
    values = np.random.default_rng(seed).standard_normal(len(d)).astype(np.float32)
    keys = {"gamma": gamma, "gae_lambda": lam, "kl_coef": coef, "kl_in": "reward", "kl_estimator": "k1"}
    batch = open_algorithm(section(**keys), 9).batch(groups, reference, values)
    found = []
    for one, said, lost in zip(groups, pieces(groups, values.astype(np.float64)), pieces(groups, d), strict=True):
        for sample, mine, kl in zip(one.samples, said, lost, strict=True):
            rewards = -coef * kl
            rewards[-1:] += sample.reward
            found.append(sums(rewards, mine, gamma, lam))
    a = np.concatenate(found)
    np.testing.assert_allclose(batch.returns, a + values, rtol=1e-5, atol=1e-5)
    expected = (a - a.mean()) / (a.std() + 1e-8) if len(a) > 1 else 0 * a
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-3, atol=1e-3)
    assert (batch.values == values).all()


def test_a_sample_without_a_reward_is_left_out() -> None:
    groups = [group([[2], [3]], [1.0, None]), group([[2]], [0.0])]
    batch = open_algorithm(section(), 9).batch(groups, None, np.zeros(7, dtype=np.float32))
    assert (batch.weights == np.float32([0.25, 0.25, 0, 0, 0, 0.25, 0.25])).all()
    assert (np.sign(batch.advantages) == [1, 1, 0, 0, 0, -1, -1]).all()


def test_its_keys() -> None:
    assert section().critic == CriticAsked(ValueLoss(0.2), 0.001)
    assert open_algorithm(section(), 9).loss == PolicyLoss(0.2, 0.2)
    section().check(9)
    with pytest.raises(UserError, match=re.escape("algorithm.sampling_rounds=2 with algorithm=ppo")):
        section(sampling_rounds=2).check(9)
