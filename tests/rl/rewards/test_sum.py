"""The sum of several rewards, what has no say in it, and what of it is logged."""

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.compose import check
from rl.config import RunConfig
from rl.data import Problem, Source, open_source
from rl.data.tokenizer import of_characters
from rl.errors import UserError
from rl.evaluation import Evaluation, Evaluator
from rl.identity import difference, identity
from rl.journal import rewards as metrics
from rl.rewards.claim import Claim
from rl.rewards.reward import Part, WeightedSum, judged_by
from rl.samples import Group, Sample
from rollout.sampling import Request, SamplingParams
from tests.rl.rewards.opening import earned, opened, verdicts

PROBLEMS = [Problem(f"p{i}", f"{i}=", (i,), str(i), str(i), {"row": i}) for i in range(6)]
numbers = st.floats(-1e6, 1e6).map(lambda x: float(np.float32(x)))


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(PROBLEMS[:4], PROBLEMS[4:], lambda p, t: float(t == p.answer), of_characters(["0123456789="]))


def value(x: float | None) -> Callable[[Problem, str], Any]:
    return lambda problem, text: x


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(numbers, st.none() | st.floats(-1e30, 1e30)), min_size=1, max_size=8))
def test_the_sum_is_rounded_once(terms: list[tuple[float, float | None]]) -> None:
    """Of products that float64 rounds; what is None, or weighs nothing, has no say."""
    parts = [Part(f"r{i}", weight, value(x)) for i, (weight, x) in enumerate(terms)]
    (verdict,) = WeightedSum(parts)([Claim(PROBLEMS[0], "")])
    products = [Fraction(weight * x) for weight, x in terms if x is not None and weight]
    assert verdict.reward == (float(sum(products)) if products else None)
    assert verdict.parts == {f"r{i}": x for i, (_, x) in enumerate(terms) if x is not None}


def test_weights_names_and_the_datas_verifier(source: Source) -> None:
    reward = opened(
        source,
        [
            "verifier",
            {"function": "tests.rl.command:length", "weight": 0.25},
            {"function": "tests.rl.command:length", "weight": 0, "name": "again"},
        ],
    )
    assert (
        reward.of_user
        and reward.name == "reward=the data's verifier + 0.25 x tests.rl.command:length + 0 x tests.rl.command:length"
    )
    assert [(v.reward, v.parts) for v in verdicts(reward, PROBLEMS[1:3], ["1", "22"])] == [
        (1.25, {"verifier": 1.0, "length": 1.0, "again": 1.0}),
        (0.5, {"verifier": 0.0, "length": 2.0, "again": 2.0}),
    ]
    half = opened(source, {"function": "verifier", "weight": 0.5})
    assert half.of_user and half.name == "reward=0.5 x the data's verifier" and earned(half, PROBLEMS[1], "1") == [0.5]
    plain = opened(source)
    assert plain.name == source.verifier and not plain.of_user and earned(plain, PROBLEMS[1], "1", "2") == [1, 0]


def test_an_error_of_one_reward_leaves_the_sample_out(source: Source) -> None:
    """Of all of them: a sum without it would be another reward."""
    told: list[str] = []
    rewards = ["verifier", "tests.rl.command:picky"]
    found = verdicts(opened(source, rewards, told.append, errors="drop"), PROBLEMS[:3], ["0", "bad", "2"])
    assert [v.reward for v in found] == [2.0, None, 2.0] and found[1].parts == {} and len(told) == 1
    with pytest.raises(UserError, match="the reward picky raised ValueError: no; problem 'p1', completion 'bad'"):
        verdicts(opened(source, rewards), PROBLEMS[:3], ["0", "bad", "2"])


def test_metrics() -> None:
    samples = [
        Sample((), "a", 1.5, {"right": 1.0, "length": 0.5}, {"length/tokens": 3, "length/first": "a"}),
        Sample((), "b", 0.5, {"length": 0.5}, {"length/tokens": 4, "length/first": "b"}),
        Sample((), "c", None, {}, {}, "the reward f raised"),
        Sample((), "d", None, {}, {}),
    ]
    groups = [Group(PROBLEMS[0], tuple(samples[:2])), Group(PROBLEMS[1], tuple(samples[2:]))]
    assert groups[1].rewards == [None, None]
    assert metrics(groups) == {
        "reward/mean": 1.0,
        "reward/std": 0.5,
        "reward/solved_frac": 0.5,
        "reward/groups_without_signal_frac": 0.5,
        "reward/left_out": 2,
        "reward/errors": 1,
        "reward/right": 1.0,
        "reward/length": 0.5,
        "reward/length/tokens": 3.5,
    }
    nobody = metrics(groups[1:])
    assert all(np.isnan(nobody[f"reward/{name}"]) for name in ("mean", "std", "solved_frac"))


class Judged:
    """An environment in which completion i of the evaluation earns rewards[i]."""

    def __init__(self, rewards: list[float | None]) -> None:
        self.rewards = rewards

    def play(self, requests: list[Request], generate: object, problems: object) -> list[tuple]:
        return [() for _ in requests]

    def judge(self, problems: list[Problem], transcripts: list[tuple]) -> list[Sample]:
        return [Sample((), "", r, error="" if r is not None else "it broke") for r in self.rewards]


def test_an_evaluation_is_of_what_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    def evaluate(rewards: list[float | None]) -> Evaluation:
        asked = [Request(i, (1,), SamplingParams(1, 0.5)) for i in range(len(rewards))]
        environment: Any = Judged(rewards)
        cards: Any = SimpleNamespace(to_rollout=lambda: None)
        evaluator = Evaluator(PROBLEMS[: len(rewards)], asked, environment, "reward=f")
        return evaluator(0, lambda r: [], cards, lambda: None, Console(soft_wrap=True))

    found = evaluate([1.0, None, 0.0, 1.5])
    assert (found.accuracy, found.reward, found.left_out) == (2 / 3, 2.5 / 3, 1)
    said = capsys.readouterr().out
    assert (
        "accuracy 0.667 (" in said and "; 2 of 3 earn 1, mean reward 0.833, 0.0 tokens, 1 left out, by reward=f" in said
    )
    with pytest.raises(UserError, match="no completion is judged: reward=f leaves all out, first: it broke"):
        evaluate([None, None])


@pytest.mark.parametrize(
    ("reward", "reads"),
    [(None, True), ("answer", True), (["format", "verifier"], True), ("a:f", False), (["format", "code"], False)],
)
def test_answers_are_needed_where_one_reward_reads_them(tmp_path: Path, reward: Any, reads: bool) -> None:
    """Rows without an answer are data for the other rewards."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": f"{i}?", "x": i}) + "\n" for i in range(40)))
    named = "null" if reward is None else reward if isinstance(reward, str) else f"[{','.join(reward)}]"
    (config,) = check(["data=dataset", f"data.path={tmp_path}/rows.jsonl", "warmup.steps=0", f"reward={named}"])
    if reads:
        with pytest.raises(UserError, match="no field is known as the answer"):
            open_source(config)
        return
    source = open_source(config)
    assert judged_by(config.reward, source) == f"reward={named.strip('[]').replace(',', ' + ')}"
    assert len(source.train) + len(source.held_out) == 40


def test_what_makes_another_run() -> None:
    """Which rewards there are, their weights and arguments; not how they are computed, nor how they are written down."""

    def of(*overrides: str) -> dict[str, Any]:
        return identity(check([*overrides])[0])

    same = (
        (("reward=verifier",), ()),
        (("reward=[verifier]",), ()),
        (("reward=[a:f]",), ("reward=a:f",)),
        (("reward=[{function:a:f,weight:1,args:{}}]",), ("reward=a:f",)),
        (("scoring.workers=7", "scoring.timeout=1", "scoring.total=2", "scoring.errors=drop"), ()),
    )
    for a, b in same:
        assert not difference(of(*a), of(*b))
    other = ("reward=a:f", "reward=[{function:a:f,weight:2}]", "reward=[{function:a:f,args:{x:1}}]", "reward=[a:f,b:g]")
    for i, a in enumerate(("reward=verifier", *other)):
        for b in other[i:]:
            assert "reward=" in difference(of(a), of(b))


def test_a_config_that_was_written_is_read_as_it_was() -> None:
    for override in ("reward=null", "reward=a:f", "reward=[{function:a:f,weight:2,args:{x:[1,y]}},format]"):
        (config,) = check([override])
        assert RunConfig.model_validate(config.model_dump(mode="json")) == config
