"""Runs that have to stop: a differing bit, other weights, an exception in a worker, a dead worker, a signal."""

import contextlib
import errno
import os
import re
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.algorithms import open_algorithm
from rl.cluster import RolloutFleet, TrainerFleet, cluster
from rl.cluster.family import WORDLESS
from rl.compose import check
from rl.prepare import prepare
from rl.report.folder import lines
from rl.samples import Group
from rl.train import train
from rollout.sampling import Request, RequestError, SamplingParams
from tests.rl.command import SHORT, Outcome, call, command
from tests.rl.faults import break_in
from trainer.batch import Batch, StepReport
from trainer.loss import Loss, PolicyLoss

pytestmark = pytest.mark.slow

Fleets = tuple[RolloutFleet, TrainerFleet]


@pytest.fixture(scope="module")
def fleets() -> Iterator[Fleets]:
    """The processes of a real run, shared by the tests in this process."""
    config = check([*SHORT, "out_dir=unused"])[0]
    with cluster(config, prepare(config).model) as started:
        yield started


class Altered:
    """GRPO, whose batches `alter` changes."""

    def __init__(self, alter: Callable[[Batch], Batch], section: Any, limit: int) -> None:
        self.alter, self.real = alter, open_algorithm(section, limit)
        self.loss = self.real.loss

    def batch(self, groups: Sequence[Group], reference: Any = None) -> Batch:
        return self.alter(self.real.batch(groups, reference))


class Flipping(TrainerFleet):
    """The same ranks. The lowest bit of one of their log-probs is another one in GRPO step 2; `place` says where that is."""

    def __init__(self, fleet: TrainerFleet) -> None:
        super().__init__(fleet.ranks, fleet.places)
        self.policy_steps = 0
        self.place: dict[str, Any] = {}

    def step(self, batch: Batch, loss: Loss, lr: float) -> StepReport:
        report, place = super().step(batch, loss, lr), self.place
        self.policy_steps += isinstance(loss, PolicyLoss)
        if self.policy_steps != 2:
            return report
        sample = 11
        row = int(batch.counts[:sample].sum())  # its first sampled token
        place["sample"], place["position"] = sample, int(batch.lengths[sample] - batch.counts[sample])
        place["token"] = int(batch.take(sample, sample + 1).token_ids[place["position"]])
        bits = report.logprobs.copy().view(np.uint32)
        place["rollout"] = int(bits[row])
        bits[row] ^= 1
        place["trainer"] = int(bits[row])
        return replace(report, logprobs=bits.view(np.float32))


def same(batch: Batch) -> Batch:
    return batch


@pytest.fixture
def run(fleets: Fleets, tmp_path: Path) -> Callable[..., Outcome]:
    """The command in this process, on the shared processes."""
    short = [*SHORT, "warmup.steps=1", "eval.problems=4", f"out_dir={tmp_path / 'run'}"]

    def call_on(*overrides: str, trainer: TrainerFleet = fleets[1], alter: Callable[[Batch], Batch] = same) -> Outcome:
        started = contextlib.nullcontext((fleets[0], trainer))
        return call(
            *short, *overrides, train=partial(train, start=lambda *_: started, make_algorithm=partial(Altered, alter))
        )

    return call_on


def test_one_bit_stops_the_run(run: Callable[..., Outcome], fleets: Fleets, tmp_path: Path) -> None:
    flipping = Flipping(fleets[1])
    line = run(trainer=flipping).error(code=1)
    assert line.startswith("step 2: ")
    for part in ("sample {sample},", "position {position},", "token {token}:", "0x{trainer:08x}", "0x{rollout:08x}"):
        assert part.format(**flipping.place) in line
    assert "1 of " in line
    assert not (tmp_path / "run" / "summary.json").exists() and not (tmp_path / "run" / "model").exists()


def test_warn_goes_on_and_counts(run: Callable[..., Outcome], fleets: Fleets, tmp_path: Path) -> None:
    flipping = Flipping(fleets[1])
    outcome = run("align.policy=warn", trainer=flipping)
    assert outcome.code == 0 and f"0x{flipping.place['trainer']:08x}" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert "1 of " in outcome.out and '"tokens_nonzero": 1,' in (tmp_path / "run" / "summary.json").read_text()


def test_not_finite_in_a_worker(run: Callable[..., Outcome]) -> None:
    """An exception in a worker arrives with its own text."""
    line = run(alter=lambda b: replace(b, advantages=b.advantages * np.float32(np.nan))).error(code=1)
    assert re.match(r"trainer rank \d failed: TrainerError: step 1: .* nan", line), line


def test_reward_that_raises_late(run: Callable[..., Outcome]) -> None:
    """The trial at the start cannot find it; the line names the problem and the completion."""
    line = run("reward=tests.rl.command:late").error(code=2)
    assert "IndexError" in line and "problem '" in line and "completion '" in line


def test_rewards_that_fail_are_dropped(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """Counted in every step, told once, and no sample of theirs earns anything."""
    outcome = run("reward=[verifier,{function:tests.rl.command:at_times,weight:0.5}]", "scoring.errors=drop")
    assert outcome.code == 0, outcome.err
    golds, told = outcome.err.splitlines()
    assert "golds do not earn 1 by reward=the verifier of chain_sum + 0.5 x tests.rl.command:at_times" in golds
    assert "warning: the reward at_times raised ValueError: not this one; problem '" in told
    assert told.endswith("left out (scoring.errors=drop), as all that follow; reward/errors counts them")
    assert told.removeprefix("samebit: ") in (tmp_path / "run" / "train.log").read_text()
    steps = [row for row in lines(tmp_path / "run" / "metrics.jsonl") if "reward/mean" in row]
    assert len(steps) > 1 and all(0 < row["reward/errors"] == row["reward/left_out"] for row in steps)
    assert all({"reward/verifier", "reward/at_times"} <= set(row) for row in steps)
    for row in lines(tmp_path / "run" / "completions.jsonl"):
        failed = zlib.crc32(row["completion"].encode()) % 3 == 0
        assert ("not this one" in row.get("error", "")) == failed == (row["reward"] is None) == (not row["rewards"])


def test_a_full_disk(run: Callable[..., Outcome], tmp_path: Path) -> None:
    def full(_: Batch) -> Batch:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = run(alter=full).error(code=1)
    assert re.match(f"out_dir={tmp_path / 'run'}: .*No space left on device: make room", line)


def test_a_file_that_cannot_be_written(run: Callable[..., Outcome], tmp_path: Path) -> None:
    def denied(_: Batch) -> Batch:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "run" / "metrics.jsonl"))

    line = run(alter=denied).error(code=1)
    assert "metrics.jsonl): make it writable" in line and "Permission denied" in line


def test_interrupted(run: Callable[..., Outcome], tmp_path: Path) -> None:
    def interrupt(_: Batch) -> Batch:
        raise KeyboardInterrupt

    line = f"interrupted; with out_dir={tmp_path / 'run'} the same command goes on"  # out_dir has a default with a time
    assert run(alter=interrupt).error(code=130) == line
    other = run("checkpoint.every=0", f"out_dir={tmp_path / 'other'}", alter=interrupt)
    assert other.error(code=130) == "interrupted"


def test_request_that_no_engine_can_serve(fleets: Fleets) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary"):
        fleets[0].generate([Request(0, (10**6,), SamplingParams(2))])


def test_dead_trainer_rank(fleets: Fleets, run: Callable[..., Outcome]) -> None:
    """The last test of the shared processes. Rank 0 dies in the middle of a step; rank 1 meets a broken connection."""
    break_in(fleets[1].ranks[0].actor, "trainer", "_backward", 2, "dies")
    start = time.monotonic()
    line = run().error(code=1)
    assert line.startswith("trainer rank 0 failed: ActorDiedError"), line
    assert time.monotonic() - start < 30


LONG = ("steps=5000", "warmup.steps=2", "eval.problems=8", "logger=none", "out_dir=run", "data.problems=500")


def test_dead_rollout_rank(tmp_path: Path) -> None:
    with command(*LONG, cwd=tmp_path) as running:
        running.line("held-out accuracy")
        os.kill(running.family("ray::RolloutRank")[0], signal.SIGKILL)
        start = time.monotonic()
        line = running.finish(timeout=60).error(code=1)
        assert time.monotonic() - start < 30
        assert re.match(r"rollout engine 0 rank \d failed: ActorDiedError", line), line
        running.assert_nothing_left()
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("when", ["start", "ranks", "steps"])
def test_a_signal_ends_it_as_an_interrupt_does(tmp_path: Path, when: str, number: signal.Signals, code: int) -> None:
    """One line, in the console and in train.log; no process is left."""
    with command(*LONG, cwd=tmp_path) as running:
        if when == "steps":
            running.line("held-out accuracy")
        else:
            running.wait_for("raylet/raylet" if when == "start" else "ray::TrainerRank")
        running.process.send_signal(number)
        line = running.finish(timeout=60).error(code)
        goes_on = "; with out_dir=run the same command goes on" if when == "steps" else ""
        assert line == f"ended by {number.name}{goes_on}"
        running.assert_nothing_left()
    assert (tmp_path / "run").exists() is (when == "steps")
    if when == "steps":
        assert (
            (tmp_path / "run" / "train.log")
            .read_text()
            .splitlines()[-1]
            .endswith(f"stopped by Terminated: {number.name}")
        )


@pytest.mark.parametrize("name", ["RolloutRank", "TrainerRank"])
def test_a_rank_that_is_stopped(tmp_path: Path, name: str) -> None:
    with command(*LONG, "cluster.patience=5", cwd=tmp_path) as running:
        running.line("held-out accuracy")
        pid = running.family(f"ray::{name}")[0]
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        line = running.finish(timeout=120).error(code=1)
        assert time.monotonic() - start < 60
        who = "rollout engine 0" if name == "RolloutRank" else "trainer"
        assert re.match(
            rf"step \d+: {who} rank \d \(pid {pid}\) was stopped, .* go on within cluster.patience=5 s", line
        ), line
        running.assert_nothing_left()


def test_a_rank_that_goes_on(tmp_path: Path) -> None:
    """Stopped for less than that: no bit and no line of the run shows it."""
    with command(*LONG, "steps=2", cwd=tmp_path) as running:
        running.line("held-out accuracy")
        pid = running.family("ray::TrainerRank")[0]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(5)
        os.kill(pid, signal.SIGCONT)
        assert running.finish().code == 0


@pytest.mark.parametrize(("process", "name"), [("raylet/raylet", "raylet"), ("gcs_server", "GCS")])
def test_ray_itself_is_lost(tmp_path: Path, process: str, name: str) -> None:
    with command(*LONG, cwd=tmp_path) as running:
        running.line("held-out accuracy")
        os.kill(running.family(process)[0], signal.SIGKILL)
        start = time.monotonic()
        line = running.finish(timeout=120).error(code=1)
        assert time.monotonic() - start < 60
        said = rf"Ray's {name} \([\d.]+:\d+\) has ended|rollout .*Died|trainer .*Died|{re.escape(WORDLESS)}"
        assert re.match(said, line), line
        running.assert_nothing_left()
    assert line in (tmp_path / "run" / "train.log").read_text().splitlines()[-1]
