"""GRPO: advantages against float64 references, exact weights, and the batch."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rl.algorithms import open_algorithm
from rl.algorithms.grpo import GrpoSection, advantages, loss_counts
from rl.data import Problem
from rl.samples import Group, Sample
from rollout.sampling import Completion, SamplingParams
from trainer.loss import PolicyLoss

rewards_of_a_group = st.lists(st.floats(-100, 100) | st.sampled_from([0.0, 1.0]), min_size=2, max_size=16)
quick = settings(max_examples=150, deadline=None, derandomize=True)


def reference(rewards: list[float], kind: str) -> np.ndarray:
    r = np.asarray(rewards, dtype=np.float64)
    if kind == "rloo":
        return np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))])
    return (r - r.mean()) / (r.std(ddof=1) + 1e-4) if kind == "grpo" else r - r.mean()


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@quick
@given(rewards=rewards_of_a_group)
def test_advantages(kind: str, rewards: list[float]) -> None:
    found = advantages(rewards, kind)
    # a group of almost equal rewards divides rounding errors of 1e-14 by 1e-4
    np.testing.assert_allclose(found, reference(rewards, kind), rtol=1e-9, atol=1e-9)
    assert math.fsum(found) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@quick
@given(rewards=rewards_of_a_group, data=st.data())
def test_advantages_follow_a_permutation(kind: str, rewards: list[float], data: st.DataObject) -> None:
    """To the bit: the sums are exact."""
    order = data.draw(st.permutations(range(len(rewards))))
    plain, moved = advantages(rewards, kind), advantages([rewards[i] for i in order], kind)
    assert moved == tuple(plain[i] for i in order)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -3.7])
def test_no_signal(kind: str, reward: float) -> None:
    assert np.abs(advantages([reward] * 8, kind)).max() < 1e-10


def group(sizes: list[list[int]], rewards: list[float]) -> Group:
    """Samples of one problem; `sizes`: of each sample's completions, between which two tokens are given."""
    samples = []
    for of_turns, reward in zip(sizes, rewards, strict=True):
        turns = [Completion(0, (7,) * n, (-0.5,) * n, "stop", 0, SamplingParams(9, 0.7)) for n in of_turns]
        samples.append(Sample(tuple(x for turn in turns for x in ((1, 2), turn)), "", reward))
    return Group(Problem("p", "", (1, 2), "", "", None), tuple(samples))


def section(**more: object) -> GrpoSection:
    keys = {"name": "grpo", "prompts_per_step": 2, "group_size": 2, "advantage": "dr_grpo", "loss_mean": "token"}
    return GrpoSection.model_validate(keys | {"clip_low": 0.1, "clip_high": 0.3} | more)


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=2, max_size=4), min_size=1, max_size=4))
def test_each_token_has_the_worth_of_its_sample_and_an_exact_share(mean: str, sizes: list[list[list[int]]]) -> None:
    groups = [group(one, [0.25 * i - g for i in range(len(one))]) for g, one in enumerate(sizes)]
    batch = open_algorithm(section(loss_mean=mean), 9).batch(groups)
    counts = [sum(of_turns) for one in sizes for of_turns in one]
    worth = [a for g in groups for a in advantages(g.rewards, "dr_grpo")]
    assert batch.counts.tolist() == counts
    at = 0
    for n, advantage in zip(counts, worth, strict=True):
        count = {"token": sum(counts), "sequence": len(counts) * n, "constant": len(counts) * 9}[mean]
        assert batch.weights[at : at + n].tolist() == [np.float32(1 / max(count, 1))] * n
        assert batch.advantages[at : at + n].tolist() == [np.float32(advantage)] * n
        at += n
    if mean != "constant" and all(counts):
        assert batch.weights.sum(dtype=np.float64) == pytest.approx(1, rel=1e-6)


def test_counts_are_whole_numbers_of_at_least_one() -> None:
    assert loss_counts(np.array([0, 0]), "token", 9).tolist() == [1, 1]
    assert loss_counts(np.array([0, 3]), "sequence", 9).tolist() == [1, 6]
    assert loss_counts(np.array([0, 3]), "constant", 9).tolist() == [18, 18]


def test_its_keys_make_its_loss() -> None:
    assert open_algorithm(section(), 9).loss == PolicyLoss(0.1, 0.3)
    with pytest.raises(ValidationError, match="grpo"):
        section(name="ppo")
