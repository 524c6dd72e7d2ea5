"""Advantages against float64 references, and to the bit where nothing may depend on an order."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms.advantages import group_advantages, normalised

REWARD = st.floats(-100, 100) | st.sampled_from([0.0, 1.0])
MAYBE = st.none() | REWARD
rewards_of_a_group = st.lists(REWARD, min_size=2, max_size=16)
quick = settings(max_examples=150, deadline=None, derandomize=True)
KINDS = ("grpo", "dr_grpo", "rloo")


def reference(rewards: list[float], kind: str) -> np.ndarray:
    r = np.asarray(rewards, dtype=np.float64)
    if kind == "rloo":
        return np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))])
    return (r - r.mean()) / (r.std(ddof=1) + 1e-4) if kind == "grpo" else r - r.mean()


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(rewards=rewards_of_a_group)
def test_of_a_group(kind: str, rewards: list[float]) -> None:
    found = group_advantages(rewards, kind)
    # a group of almost equal rewards divides rounding errors of 1e-14 by 1e-4
    np.testing.assert_allclose(found, reference(rewards, kind), rtol=1e-9, atol=1e-9)
    assert math.fsum(found) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(rewards=rewards_of_a_group, data=st.data())
def test_they_follow_a_permutation(kind: str, rewards: list[float], data: st.DataObject) -> None:
    """To the bit: the sums are exact."""
    order = data.draw(st.permutations(range(len(rewards))))
    plain, moved = group_advantages(rewards, kind), group_advantages([rewards[i] for i in order], kind)
    assert moved == tuple(plain[i] for i in order)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(rewards=st.lists(MAYBE, min_size=1, max_size=12))
def test_what_has_no_reward_is_in_no_statistic(kind: str, rewards: list[float | None]) -> None:
    there = [r for r in rewards if r is not None]
    found = group_advantages(rewards, kind)
    assert [a for a, r in zip(found, rewards, strict=True) if r is not None] == list(group_advantages(there, kind))
    assert not any(a for a, r in zip(found, rewards, strict=True) if r is None or len(there) < 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.7])
def test_no_signal(kind: str, reward: float) -> None:
    assert np.abs(group_advantages([reward] * 8, kind)).max() < 1e-10


@quick
@given(st.lists(st.tuples(MAYBE, st.integers(0, 9)), min_size=1, max_size=16))
def test_over_the_batch(drawn: list[tuple[float | None, int]]) -> None:
    """As over the tokens one by one, in float64; and to the bit in any order of the samples."""
    worth, counts = zip(*drawn, strict=True)
    found = normalised(worth, counts)
    tokens = np.array([a for a, n in drawn for _ in range(n) if a is not None])
    mean, std = (tokens.mean(), tokens.std()) if len(tokens) else (0.0, 0.0)
    for a, got in zip(worth, found, strict=True):
        expected = 0.0 if a is None else (a - mean) / (std + 1e-8)
        # equal rewards divide a rounding error of 1e-14 by 1e-8; where no sample has a token nothing is trained on
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-5) or not len(tokens)
    order = sorted(range(len(drawn)), key=lambda i: (i * 7919) % 13)
    assert normalised([worth[i] for i in order], [counts[i] for i in order]) == tuple(found[i] for i in order)
