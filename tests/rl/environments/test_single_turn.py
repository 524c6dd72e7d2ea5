"""The environment of one prompt and one completion."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from rl.data import Problem, Source
from rl.data.tokenizer import of_characters
from rl.environments.environment import score
from rl.environments.single_turn import SingleTurn
from rl.errors import UserError
from rl.rewards.reward import Part, Reward, WeightedSum
from rl.samples import completions
from rollout.sampling import Completion, Request, SamplingParams


@pytest.fixture(scope="module")
def source() -> Source:
    tokenizer = of_characters(["0123456789+-="])
    problems = [Problem(f"p{i}", f"{i}=", tokenizer.encode(f"{i}="), str(i), str(i), None) for i in range(3)]
    return Source(problems, problems, lambda p, text: float(text == p.answer), tokenizer)


def completion(source: Source, i: int, text: str) -> Completion:
    ids = source.tokenizer.completion(text)
    return Completion(i, ids, (0.0,) * len(ids), "stop", 0, SamplingParams(9))


def environment(source: Source, judge: Callable[..., Any]) -> SingleTurn:
    part = Part("verifier", 1.0, judge)
    return SingleTurn(source.tokenizer, Reward("the data's verifier", WeightedSum([part]), of_user=False))


def test_every_request_is_a_prompt_and_its_completion(source: Source) -> None:
    """In the order of the requests, whoever answers them."""
    asked = [Request(i, (i + 1,), SamplingParams(3, seed=i)) for i in range(4)]
    served = []

    def generate(requests: Sequence[Request]) -> list[Completion]:
        served.extend(requests)
        return [completion(source, r.id, str(r.id)) for r in requests]

    played = environment(source, source.judge).play(asked, generate)
    assert served == asked and [t[0] for t in played] == [r.prompt_ids for r in asked]
    assert [completions(t)[0].request_id for t in played] == [r.id for r in asked]


def test_groups_are_side_by_side(source: Source) -> None:
    texts = ["0", "9", "1", "1", "", "2"]
    done = [completion(source, i, t) for i, t in enumerate(texts)]
    played = [(p.prompt_ids, c) for p, c in zip([p for p in source.train for _ in (0, 1)], done, strict=True)]
    groups = score(source.train, played, environment(source, source.judge))
    assert [g.problem.id for g in groups] == ["p0", "p1", "p2"]
    assert [s.text for g in groups for s in g.samples] == texts  # without the end-of-sequence token
    assert [s.reward for g in groups for s in g.samples] == [1, 0, 1, 1, 0, 1]
    assert [g.rewards for g in groups] == [[1, 0], [1, 1], [0, 1]]


def raising(problem: Problem, text: str) -> float:
    raise RuntimeError("boom")


@pytest.mark.parametrize(
    ("judge", "part"),
    [
        (raising, "RuntimeError: boom"),
        (lambda p, t: float("nan"), "nan, not a number"),
        (lambda p, t: float("inf"), "inf, not a number"),
        (lambda p, t: [1.0], "TypeError"),
        (lambda p, t: "good", "ValueError"),
        (lambda p: 1.0, "TypeError"),
    ],
)
def test_bad_rewards_name_problem_and_completion(source: Source, judge: Callable[..., Any], part: str) -> None:
    with pytest.raises(UserError) as error:
        environment(source, judge).judge([source.train[1]], [((1,), completion(source, 0, "42"))])
    assert part in str(error.value) and "problem 'p1'" in str(error.value) and "completion '42'" in str(error.value)


@pytest.mark.parametrize("value", [True, 1, np.float32(1), np.array(1.0)])
def test_rewards_become_floats(source: Source, value: Any) -> None:
    (sample,) = environment(source, lambda p, t: value).judge([source.train[0]], [((1,), completion(source, 0, "1"))])
    assert type(sample.reward) is float and sample.reward == 1.0 and sample.parts == {"verifier": 1.0}


def test_a_verifier_that_does_not_know_leaves_out(source: Source) -> None:
    (sample,) = environment(source, lambda p, t: None).judge([source.train[0]], [((1,), completion(source, 0, "1"))])
    assert sample.reward is None and sample.parts == {} and not sample.error
