"""GRPO: exact weights, and the batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rl.algorithms import open_algorithm
from rl.algorithms.advantages import group_advantages
from rl.algorithms.grpo import GrpoSection
from rl.algorithms.shares import loss_counts
from rl.updates import parts
from tests.rl.algorithms.groups import PLAIN, group
from trainer.loss import PolicyLoss


def section(**more: object) -> GrpoSection:
    keys = {"name": "grpo", "prompts_per_step": 2, "group_size": 2, "advantage": "dr_grpo", "loss_mean": "token"}
    return GrpoSection.model_validate(keys | {"clip_low": 0.1, "clip_high": 0.3} | PLAIN | more)


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=2, max_size=4), min_size=1, max_size=4))
def test_each_token_has_the_worth_of_its_sample_and_an_exact_share(mean: str, sizes: list[list[list[int]]]) -> None:
    groups = [group(one, [0.25 * i - g for i in range(len(one))]) for g, one in enumerate(sizes)]
    batch = open_algorithm(section(loss_mean=mean), 9).batch(groups)
    counts = [sum(of_turns) for one in sizes for of_turns in one]
    worth = [a for g in groups for a in group_advantages(g.rewards, "dr_grpo")]
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
    both = np.array([True, True])
    assert loss_counts(np.array([0, 0]), both, "token", 9).tolist() == [1, 1]
    assert loss_counts(np.array([0, 3]), both, "sequence", 9).tolist() == [1, 6]
    assert loss_counts(np.array([0, 3]), both, "constant", 9).tolist() == [18, 18]
    for mean in ("token", "sequence", "constant"):
        assert loss_counts(np.array([2, 3]), ~both, mean, 9).min() == 1


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_a_sample_without_a_reward_is_left_out(mean: str) -> None:
    """Of the loss, of the mean's count and of its group's statistics: the others are as if it had not been sampled. A group
    with one reward teaches nothing."""
    sizes = [[2], [3], [4]]
    whole = open_algorithm(section(loss_mean=mean), 9).batch(
        [group(sizes, [1.0, None, 0.0]), group(sizes, [None, 1.0, None])]
    )
    alone = open_algorithm(section(loss_mean=mean), 9).batch([group([[2], [4]], [1.0, 0.0])])
    kept = np.isin(whole.sequence, [0, 2])
    assert whole.sequences == 6 and whole.counts.tolist() == [2, 3, 4] * 2  # they are there, as the tree wants them
    for name in ("advantages", "weights"):
        column = getattr(whole, name)
        assert column[kept].tobytes() == getattr(alone, name).tobytes()
        assert not column[~kept].any()


def test_its_keys_make_its_loss() -> None:
    assert open_algorithm(section(), 9).loss == PolicyLoss(0.1, 0.3)
    with pytest.raises(ValidationError, match="grpo"):
        section(name="ppo")


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_a_mini_batch_has_a_mean_of_its_own(mean: str) -> None:
    """As if its groups had been the batch."""
    groups = [group([[3], [1]], [1.0, 0.0]), group([[2], [7]], [0.5, None]), group([[1], [9]], [0.0, 1.0])]
    apart = [open_algorithm(section(loss_mean=mean), 9).batch([one]) for one in groups]
    whole = open_algorithm(section(loss_mean=mean, mini_batches=3, prompts_per_step=3), 9).batch(groups)
    for column in ("weights", "advantages", "token_ids"):
        joined = np.concatenate([getattr(one, column) for one in apart])
        assert getattr(whole, column).tobytes() == joined.tobytes(), column
    updates = list(parts(whole, 3, 2))
    assert [u.token_ids.tolist() for u in updates] == 2 * [one.token_ids.tolist() for one in apart]
