"""Samples that are too long: DAPO's equation 13, and what is left out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms import open_algorithm
from rl.algorithms.grpo import GrpoSection
from rl.algorithms.overlong import shaped
from rl.compose import check
from rl.errors import BAD_INPUT
from rl.plan import make_plan
from tests.rl.algorithms.groups import group
from tests.rl.algorithms.test_grpo import section


def penalty(length: int, cache: int, most: int) -> float:
    """The three cases of the paper, one after another."""
    if length <= most - cache:
        return 0.0
    return ((most - cache) - length) / cache if length <= most else -1.0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=2, max_size=5),
    st.integers(1, 20),
    st.integers(0, 10),
)
def test_the_penalty_is_that_of_the_paper(sizes: list[list[int]], buffer: int, more: int) -> None:
    """Of the longest completion of a sample: each turn has the limit."""
    rewards = [None if i % 3 == 2 else float(i) for i in range(len(sizes))]
    (found,) = shaped([group(sizes, rewards)], buffer, buffer + more)
    for got, reward, turns in zip(found, rewards, sizes, strict=True):
        assert got == (None if reward is None else reward + penalty(max(turns), buffer, buffer + more))
    assert shaped([group(sizes, rewards)], 0, 5) == [rewards]


def test_a_longer_answer_is_worth_less() -> None:
    batch = open_algorithm(section(overlong_buffer=4), 9).batch([group([[5], [8], [9]], [1.0, 1.0, 1.0])])
    worth = [batch.advantages[batch.sequence == i][0] for i in range(3)]
    np.testing.assert_allclose(worth, np.array([0, -0.75, -1]) + 1.75 / 3, rtol=1e-6)


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_what_was_cut_off_is_left_out_of_the_loss_alone(mean: str) -> None:
    """Its reward still counts against the others'."""
    groups = [group([[2], [3]], [1.0, 0.0]), group([[4], [9]], [0.0, 1.0], "length")]
    keys = section(loss_mean=mean, mask_overlong=True)
    batch = open_algorithm(keys, 9).batch(groups)
    first = open_algorithm(keys, 9).batch(groups[:1])
    assert batch.weights[:5].tobytes() == first.weights.tobytes() and not batch.weights[5:].any()
    assert batch.advantages[:5].tobytes() == first.advantages.tobytes() and not batch.advantages[5:].any()
    plain = open_algorithm(GrpoSection.model_validate(keys.model_dump() | {"mask_overlong": False}), 9).batch(groups)
    assert (plain.weights > 0).all()


WHOLE = "algorithm.mini_batches=2 cut 256 sequences: 128 sequences a step are no multiple of trainer.leaf_sequences=16"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["algorithm.mini_batches=2"], WHOLE),
        (["algorithm.mini_batches=3"], "algorithm.prompts_per_step=32 is no multiple of algorithm.mini_batches=3"),
        (["algorithm.overlong_buffer=6"], "algorithm.overlong_buffer=6 tokens before rollout.max_new_tokens=5"),
        (
            ["algorithm=reinforce_plus_plus", "algorithm.sampling_rounds=2"],
            "algorithm.sampling_rounds=2 with algorithm.baseline=batch",
        ),
        (
            ["algorithm=reinforce_plus_plus", "algorithm.baseline=group", "algorithm.group_size=1"],
            "algorithm.group_size=1 with algorithm.baseline=group",
        ),
    ],
)
def test_what_does_not_combine(keys: list[str], said: str) -> None:
    (config,) = check([*keys, "model.hf.vocab_size=13"])
    with pytest.raises(BAD_INPUT, match=said):
        make_plan(config, None, 8)  # type: ignore[arg-type]
