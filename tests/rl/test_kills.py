"""A run that is killed again and again, at any moment and each time resumed in another layout, ends with the bits of the run
that nobody touched."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rl.report import read_lines
from tests.rl.command import Command, Outcome, command

pytestmark = pytest.mark.slow

RUN = (
    "steps=3",
    "warmup.steps=3",
    "warmup.sequences=64",
    "algorithm.prompts_per_step=8",
    "eval.problems=16",
    "trainer.leaf_sequences=8",
    "trainer.micro_leaves=2",
    "model.hf.num_hidden_layers=2",
    "data.problems=2000",
    "rollout.pages=256",
    "checkpoint.every=1",
    "logger=none",
)
LAYOUTS = (
    ("trainer.world_size=2", "rollout.tp=2"),
    ("trainer.world_size=1", "trainer.micro_leaves=8", "rollout.tp=1"),
    ("trainer.world_size=4", "rollout.tp=1", "checkpoint.keep=1"),
    ("trainer.world_size=1", "trainer.micro_leaves=1", "rollout.tp=1", "rollout.replicas=2"),
)
ROUNDS = int(os.environ.get("SAMEBIT_KILLS", "0"))
"""How many more kills at random moments of the run; each takes about ten seconds."""


def finish(folder: Path, *layout: str) -> Outcome:
    with command(*RUN, *layout, f"out_dir={folder / 'run'}", cwd=folder) as running:
        outcome = running.finish()
        assert outcome.code == 0, outcome
        running.assert_nothing_left()
    return outcome


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    finish(folder, *LAYOUTS[1])
    return folder / "run"


def rows(out_dir: Path) -> list[dict]:
    """The log without its clock."""
    return [
        {k: v for k, v in r.items() if not k.startswith(("time/", "memory/", "speed/"))}
        for r in read_lines(out_dir / "metrics.jsonl")
    ]


def assert_same_run(run: Path, untouched: Path) -> None:
    ends = [json.loads((d / "summary.json").read_text()) for d in (run, untouched)]
    for key in ("weights_sha256", "tokens_compared", "tokens_nonzero", "eval_accuracy_before", "eval_accuracy_after"):
        assert ends[0][key] == ends[1][key], key
    assert rows(run) == rows(untouched)  # no step twice, none missing, every figure the same
    assert (run / "completions.jsonl").read_text() == (untouched / "completions.jsonl").read_text()
    assert (run / "model/model.safetensors").read_bytes() == (untouched / "model/model.safetensors").read_bytes()
    assert not list(run.rglob("*.tmp"))


def until(running: Command, seen: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert running.process.poll() is None, running.finish()
        assert time.monotonic() < end
        time.sleep(0.001)


def lines(folder: Path) -> int:
    log = folder / "run" / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_driver(running: Command) -> None:
    running.process.send_signal(signal.SIGKILL)
    running.process.wait()
    running.assert_nothing_left(30)


def kill_rank(running: Command, name: str) -> None:
    os.kill(random.choice(running.family(f"ray::{name}")), signal.SIGKILL)
    line = running.finish(60).error(code=1)
    assert ("trainer rank" if name == "TrainerRank" else "rollout engine") in line and "ActorDiedError" in line, line
    running.assert_nothing_left()


def test_killed_and_resumed(untouched: Path, tmp_path: Path) -> None:
    """The driver during a save of the warm start; a trainer rank after it; then to the end."""
    root = tmp_path / "run" / "checkpoints"
    moments: list[tuple[Callable[[], bool], Callable[[Command], None]]] = [
        (lambda: any(root.glob(".step-0000000[23]*.tmp")), kill_driver),
        (lambda: lines(tmp_path) >= 5, lambda running: kill_rank(running, "TrainerRank")),
    ]
    for i, (moment, kill) in enumerate(moments):
        with command(*RUN, *LAYOUTS[i], f"out_dir={tmp_path / 'run'}", cwd=tmp_path) as running:
            until(running, moment)
            kill(running)
        assert not (tmp_path / "run" / "summary.json").exists()
    outcome = finish(tmp_path, *LAYOUTS[2])
    assert "resumed" in outcome.out and "warm start" not in outcome.out
    assert_same_run(tmp_path / "run", untouched)
    assert len(list(root.glob("step-*"))) == 1  # keep=1


@pytest.mark.skipif(not ROUNDS, reason="SAMEBIT_KILLS=N kills at N random moments")
def test_killed_at_random(untouched: Path, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(ROUNDS):
        with command(*RUN, *draw.choice(LAYOUTS), f"out_dir={tmp_path / 'run'}", cwd=tmp_path) as running:
            end = time.monotonic() + draw.uniform(3, 12)
            while running.process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            if running.process.poll() is None:
                ranks = running.family("ray::TrainerRank") + running.family("ray::RolloutRank")
                os.kill(draw.choice([running.process.pid, *ranks]), signal.SIGKILL)
            outcome = running.finish(60)
            running.assert_nothing_left(30)
        if outcome.code == 0:
            assert_same_run(tmp_path / "run", untouched)
            shutil.rmtree(tmp_path / "run")
    finish(tmp_path)
    assert_same_run(tmp_path / "run", untouched)
