"""Whole runs with an environment: one hash for all layouts, wherever its objects live, and also of a run that goes on."""

import json
from pathlib import Path
from typing import Any

import pytest

from rl.api import run
from rl.environments.games.calculator import Calculator
from rl.evaluation.command import main as evaluate
from rl.prove import SMALL
from tests.rl.command import command
from tests.rl.documented import undocumented

pytestmark = pytest.mark.slow

ASKED = (
    "+recipe=calculator",
    *(o for o in SMALL if not o.startswith(("warmup", "steps"))),
    "warmup.steps=40",
    "steps=2",
    "eval.every=1",
)
LAYOUT = ("rollout.tp=2", "rollout.replicas=1")
ELSEWHERE = (
    "cluster.placement=split",
    "trainer.world_size=1",
    "rollout.tp=1",
    "rollout.replicas=2",
    "rollout.pages=24",
    "rollout.page_size=3",
    "rollout.prefix_cache=false",
    "rollout.prefill_chunk=2",
    "rollout.max_batch_tokens=9",
    "rollout.max_running=3",
    "scoring.workers=1",
)


def done(cwd: Path, *overrides: str) -> dict[str, Any]:
    """The summary of a run in `cwd`/out."""
    with command(*ASKED, *overrides, "out_dir=out", cwd=cwd) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome
        running.assert_nothing_left()
    return json.loads((cwd / "out" / "summary.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("first")
    return folder / "out", done(folder, *LAYOUT)


def test_every_turn_is_exact_and_counted(first: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = first
    steps = [row for row in rows(folder) if "environment/turns_mean" in row]
    assert summary["tokens_nonzero"] == 0 and len(steps) == 2
    assert not undocumented({name for row in rows(folder) for name in row})
    for row in steps:
        assert 1 < row["environment/turns_mean"] <= 3 and 0 < row["environment/tool_calls_mean"] <= 3
        assert row["environment/errors"] == 0 and row["speed/cached_prompt_frac"] > 0.2


def test_another_layout_has_the_hash(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    other = done(tmp_path, *ELSEWHERE)
    assert other["weights_sha256"] == first[1]["weights_sha256"] and other["tokens_nonzero"] == 0
    assert other["eval_accuracy_after"] == first[1]["eval_accuracy_after"]
    mine, theirs = (
        [r["environment/turns_mean"] for r in rows(f) if "grpo/step" in r] for f in (tmp_path / "out", first[0])
    )
    assert mine == theirs


def test_a_run_that_goes_on_has_the_hash(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    done(tmp_path, "steps=1", "rollout.tp=1")
    assert done(tmp_path, "steps=2", *LAYOUT)["weights_sha256"] == first[1]["weights_sha256"]


def test_a_class_of_this_process_has_the_hash(
    first: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = run(*ASKED, "rollout.tp=1", "out_dir=out", environment=Calculator)
    assert summary["weights_sha256"] == first[1]["weights_sha256"]


def test_an_evaluation_plays_the_same_conversations(first: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    found = []
    for tp in (1, 2):
        out = tmp_path / f"{tp}.json"
        evaluate([str(first[0]), "--json", str(out), f"rollout.tp={tp}"])
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1] and found[0]["accuracy"] == first[1]["eval_accuracy_after"]
    assert found[0]["eval/response_length_mean"] == rows(first[0])[-1]["eval/response_length_mean"]
