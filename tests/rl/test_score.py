"""Rewards and advantages against float64 references."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.data import Problem, Source
from rl.data.tokenizer import of_characters
from rl.errors import UserError
from rl.rewards.reward import Reward
from rl.score import advantages, group, score
from rollout.sampling import Completion

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


@pytest.fixture(scope="module")
def source() -> Source:
    tokenizer = of_characters(["0123456789+-="])
    problems = [Problem(f"p{i}", f"{i}=", tokenizer.encode(f"{i}="), str(i), str(i), None) for i in range(3)]
    return Source(problems, problems, lambda p, text: float(text == p.answer), tokenizer)


def completion(source: Source, i: int, text: str) -> Completion:
    ids = source.tokenizer.completion(text)
    return Completion(i, ids, (0.0,) * len(ids), "stop", 0)


def of_data(judge: Callable[..., Any]) -> Reward:
    return Reward("the data's verifier", judge, of_user=False)


def test_groups_are_side_by_side(source: Source) -> None:
    texts = ["0", "9", "1", "1", "", "2"]
    done = [completion(source, i, t) for i, t in enumerate(texts)]
    groups = group(source.train, done, source, of_data(source.judge), "dr_grpo")
    assert [g.problem.id for g in groups] == ["p0", "p1", "p2"]
    assert [s.text for g in groups for s in g.samples] == texts  # without the end-of-sequence token
    assert [s.reward for g in groups for s in g.samples] == [1, 0, 1, 1, 0, 1]
    assert [g.advantages for g in groups] == [(0.5, -0.5), (0, 0), (-0.5, 0.5)]


def raising(problem: Problem, text: str) -> float:
    raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("judge", "part"),
    [
        (raising, "RuntimeError: boom"),
        (lambda p, t: float("nan"), "nan, not a number"),
        (lambda p, t: float("inf"), "inf, not a number"),
        (lambda p, t: None, "TypeError"),
        (lambda p, t: "good", "ValueError"),
        (lambda p: 1.0, "TypeError"),
    ],
)
def test_bad_rewards_name_problem_and_completion(source: Source, judge: Callable[..., Any], part: str) -> None:
    with pytest.raises(UserError) as error:
        score(source.train[1], [completion(source, 0, "42")], source, of_data(judge))
    assert part in str(error.value) and "problem 'p1'" in str(error.value) and "completion '42'" in str(error.value)


@pytest.mark.parametrize("value", [True, 1, np.float32(1), np.array(1.0)])
def test_rewards_become_floats(source: Source, value: Any) -> None:
    sample = score(source.train[0], [completion(source, 0, "1")], source, of_data(lambda p, t: value))[0]
    assert type(sample.reward) is float and sample.reward == 1.0
