"""Runs from Python: functions and rows as objects are the run that a command line would do."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from rl.api import _named, run
from rl.data import Problem
from rl.errors import UserError
from rl.rewards.claim import Claim
from rl.rewards.here import Here
from rl.rewards.reward import open_reward
from rl.rewards.section import Rewards, ScoringSection
from rl.rewards.styles import Function
from rl.rewards.worker import Call
from tests.rl.command import command

ROWS = [{"question": f"{a}+{b}=", "answer": a + b, "where": {"row": 10 * a + b}} for a in range(10) for b in range(10)]
SMALL = (
    "steps=2",
    "warmup.steps=2",
    "warmup.sequences=16",
    "algorithm.prompts_per_step=4",
    "algorithm.group_size=4",
    "eval.problems=4",
    "trainer.leaf_sequences=2",
    "trainer.micro_leaves=1",
    "logger=none",
    "save_model=false",
    "rollout.max_new_tokens=4",
)


def length(problem: Problem, text: str) -> float:
    return len(text) / 4 + problem.record["where"]["row"] / 1000


@pytest.mark.slow
def test_objects_are_the_run_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []

    def closure(problem: Problem, text: str) -> float:
        seen.append(text)
        return length(problem, text)

    summary = run(*SMALL, "out_dir=here", reward=closure, data=ROWS)
    assert seen and summary["tokens_nonzero"] == 0 and summary["judged_by"].startswith("reward=tests.rl.test_api:")
    assert json.loads((tmp_path / "here" / "summary.json").read_text())["weights_sha256"] == summary["weights_sha256"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    function = f"reward={__file__}:length"
    asked = (*SMALL, "data=dataset", "data.path=rows.jsonl", function, "out_dir=there")
    with command(*asked, cwd=tmp_path) as running:
        assert running.finish().code == 0
    there = json.loads((tmp_path / "there" / "summary.json").read_text())
    assert there["weights_sha256"] == summary["weights_sha256"]


def test_bad_input_is_an_error_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("logger=none", "out_dir=x")
    for arguments, named, said in (
        (small, {"held_out": ROWS}, "held_out without data"),
        (("seed=0,1", *small), {}, "2 runs"),
        (small, {"data": [{"question": "1", "answer": []}]}, "answer"),
        (small, {"data": [1]}, "data: "),
        (small, {"data": ROWS, "reward": lambda one: 1.0}, "takes (one)"),
        (small, {"data": ROWS, "reward": "no.module:f"}, "no.module"),
        (small, {"data": ROWS, "reward": [lambda p, t: 1.0, lambda p, t: 2.0]}, "two rewards are called"),
        (("stpes=3", *small), {}, "did you mean steps?"),
    ):
        with pytest.raises(UserError) as error:
            run(*arguments, **named)  # type: ignore[arg-type]
        assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "x").exists()


class Counting:
    def __call__(self, problem: Problem, text: str) -> float:
        return 1.0


def test_how_objects_are_called_in_the_logs() -> None:
    objects: dict[str, Any] = {}
    weighted = {"function": lambda p, t: 0, "weight": 2, "name": "mine"}
    found = [_named(r, objects) for r in (length, Counting(), "format", weighted)]
    assert [(f["function"].rpartition(":")[2], f.get("name")) for f in found] == [
        ("length", "length"),
        ("Counting", "Counting"),
        ("format", None),
        ("test_how_objects_are_called_in_the_logs.<locals>.<lambda>", "mine"),
    ]
    assert len(objects) == 3 and found[3]["weight"] == 2


PROBLEMS = [Problem(f"p{i}", f"{i}=", (i,), str(i), str(i), {"row": i}) for i in range(3)]
CLAIMS = [Claim(p, text) for p in PROBLEMS for text in ("a", p.answer)]


async def awaited(problem: Problem, text: str) -> float:
    return float(text == problem.answer)


def batched(prompts: list[str], completions: list[str], row: list[int], **more: Any) -> list[float]:
    return [r + len(c) for r, c in zip(row, completions, strict=True)]


def eighth(problem: Problem, text: str) -> float:
    return len(text) / 8


def test_objects_and_names_stand_in_one_sum() -> None:
    """An async one, one that is called with all samples of a problem, and two of a pool; whatever stands first."""
    entries = ["tests.rl.test_api:awaited", "x:mine", {"function": "exact", "weight": 3.0}, "x:more"]
    source: Any = None
    scoring = ScoringSection(errors="fail", workers=2, timeout=300, total=3600)
    for order in (entries, entries[::-1]):
        sections = TypeAdapter[Any](Rewards).validate_python(order)
        reward = open_reward(sections, source, scoring, objects={"x:mine": batched, "x:more": eighth})
        found = [v.reward for v in reward.judge(CLAIMS)]
        right = [float(text == p.answer) for p in PROBLEMS for text in ("a", p.answer)]
        assert found == [4 * right[i] + i // 2 + 1 + 1 / 8 for i in range(6)]


def test_what_an_object_raises_is_told_and_ends_where_the_pool_would() -> None:
    def raises(problem: Problem, text: str) -> float:
        raise KeyError(problem.id)

    here = Here({0: Function(raises, {}), 1: Function(eighth, {})}, None)
    calls = [Call(i, (claim,)) for i in (1, 0, 1) for claim in CLAIMS[:2]]
    assert len(here(calls, until_error=True)) == 3
    answers = here(calls, until_error=False)
    assert [bool(a[0].error) for a in answers] == [False, False, True, True, False, False]
    assert answers[2][0].error == "raised KeyError: 'p0'"

    def interrupted(problem: Problem, text: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Here({0: Function(interrupted, {})}, None)(calls[2:3], until_error=True)
