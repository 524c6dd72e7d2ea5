"""Sampling that is ahead of training: which weights drew what, on both sides at once and in turn, whatever the clock says."""

import contextlib
import pickle
import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.distributed.device_mesh import DeviceMesh

from rl.align import AlignmentError
from rl.checkpoints import Progress
from rl.compose import check
from rl.dynamic_sampling import Drawn
from rl.environments.conversation import Outcome, Played
from rl.errors import UserError
from rl.lag import FILE, Ahead, Lagging, drawn_ahead
from rl.prepare import prepare
from rl.prove import SMALL, Layout, against, prove
from rl.report import read_lines
from rl.resume import Start
from rollout.sampling import Completion, SamplingParams
from tests.rl.algorithms.groups import group
from tests.rl.in_process import Run, plain
from tests.rl.test_step import Fake, Told, loop
from trainer.batch import Batch, StepReport

STEPS = 5


class Slow(Fake):
    """Takes its time on either side, and writes down by which weights each batch was drawn."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.pauses, self.drawn = random.Random(seed), dict[int, set[int]]()
        self.weights = self.past = 0  # the trainer's steps

    def generate(self, requests: Any) -> list[Completion]:
        time.sleep(self.pauses.random() / 50)
        return super().generate(requests)

    def step(self, batch: Batch, loss: object, lr: float) -> StepReport:
        time.sleep(self.pauses.random() / 50)
        self.weights += 1
        self.drawn[self.weights] = set(batch.versions.tolist())
        return super().step(batch, loss, lr)

    def logprobs(self, batch: Batch) -> np.ndarray:
        assert set(batch.versions.tolist()) == {self.weights}, "compared by other weights than drew it"
        return self._said(batch)

    def remember(self) -> None:
        self.past = self.weights

    def past_logprobs(self, batch: Batch) -> np.ndarray:
        assert set(batch.versions.tolist()) == {self.past}, "compared by other weights than drew it"
        return self._said(batch)

    def _said(self, batch: Batch) -> np.ndarray:
        self.calls.append(("compared", self.weights))
        logprobs = batch.logprobs.copy()
        logprobs.view(np.uint32)[3] ^= self.flip
        return logprobs


@pytest.mark.parametrize("at_once", [False, True], ids=["in turn", "at once"])
@pytest.mark.parametrize("lag", [1, 2, 4, 9])
def test_which_weights_draw_a_step(lag: int, at_once: bool) -> None:
    fake = Slow(lag)
    step = Lagging(fake.steps(), lag, 1, STEPS, at_once, None)
    step.publish(0)
    told = [step(number, show=False)[0] for number in range(1, STEPS + 1)]
    assert fake.drawn == {number: {max(0, number - 1 - lag)} for number in range(1, STEPS + 1)}
    assert [m["policy/version_lag"] for m in told] == [min(lag, number - 1) for number in range(1, STEPS + 1)]
    assert all(m["divergence/tokens_compared"] == 12 and m["divergence/tokens_nonzero"] == 0 for m in told)
    assert [m["policy/updates_on_policy"] for m in told] == [1, *[0] * (STEPS - 1)]
    assert fake.cursor == 3 * STEPS, "nothing is drawn that no step trains on"
    assert [call for call in fake.calls if call[0] == "publish"] == [("publish", n) for n in range(STEPS + 1)]
    assert all({"time/sample", "time/train", "time/step"} <= m.keys() for m in told)


def test_both_sides_are_busy_at_once() -> None:
    """Each waits until the other has begun: in turn this would hang."""
    fake, sampling, training = Slow(), threading.Event(), threading.Event()

    def generate(requests: Any) -> list[Completion]:
        if fake.cursor > 3:  # those of the second step, while the first is trained
            sampling.set()
            assert training.wait(60)
        return Fake.generate(fake, requests)

    def train(batch: Batch, loss: object, lr: float) -> StepReport:
        training.set()
        assert sampling.wait(60)
        return Slow.step(fake, batch, loss, lr)

    parts = replace(fake.steps(), rollout=SimpleNamespace(generate=generate), trainer=SimpleNamespace(
        step=train, logprobs=fake.logprobs, remember=fake.remember, past_logprobs=fake.past_logprobs
    ))  # type: ignore[arg-type]  # fmt: skip
    Lagging(parts, 1, 1, 2, True, None)(1, show=False)
    assert sampling.is_set() and training.is_set()


@pytest.mark.parametrize("at_once", [False, True], ids=["in turn", "at once"])
def test_a_bit_that_differs_stops_the_run_before_it_is_trained_on(at_once: bool) -> None:
    fake = Slow()
    step = Lagging(fake.steps(), 1, 1, STEPS, at_once, None)
    step(1, show=False)
    fake.flip = 1
    with pytest.raises(AlignmentError, match=f"step {2 if at_once else 3}: sample 1, position 3, token 6"):
        step(2, show=False)
    assert fake.weights == 1


def test_how_often_is_compared() -> None:
    fake = Slow()
    step = Lagging(fake.steps(), 1, 3, STEPS, True, None)
    told = [step(number, show=True)[0] for number in range(1, STEPS + 1)]
    assert ["divergence/tokens_compared" in m for m in told] == [True, False, False, True, False]
    assert [call[1] for call in fake.calls if call[0] == "shown"] == [11, 14]


def test_what_sampling_raises_is_raised() -> None:
    fake = Slow()
    step = Lagging(fake.steps(), 1, 1, STEPS, True, None)
    step(1, show=False)

    def fail(requests: Any) -> list[Completion]:
        raise OSError("the engine is gone")

    step.step = replace(step.step, rollout=SimpleNamespace(generate=fail))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="the engine is gone"):
        step(2, show=False)


def begin(folder: Path, files: dict[str, bytes], step: int) -> Start:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    checkpoint: Any = SimpleNamespace(folder=folder, run={"progress": {"step": step}})
    return Start(checkpoint, True, ())


@pytest.mark.parametrize("at_once", [False, True], ids=["in turn", "at once"])
def test_a_checkpoint_holds_what_was_drawn_ahead(at_once: bool, tmp_path: Path) -> None:
    """The run goes on with it, and draws no problem twice; so does one that was to end there."""
    fake = Slow()
    step = Lagging(fake.steps(), 2, 1, None, at_once, None)
    step.publish(0)
    for number in (1, 2):
        step(number, show=False)
    there = begin(tmp_path, step.ahead(), 2)
    again = Slow(7)
    again.cursor, again.weights = fake.cursor, fake.weights
    rest = Lagging(again.steps(), 2, 1, STEPS, not at_once, drawn_ahead(there))
    rest.publish(2)
    for number in range(3, STEPS + 1):
        rest(number, show=False)
    assert again.drawn == {number: {max(0, number - 3)} for number in range(3, STEPS + 1)}
    assert again.cursor == 3 * STEPS


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    completion = Completion(0, (5,), (-0.5,), "stop", 0, SamplingParams(2))
    (one,) = (group([[1]], [0.5]),)
    played = Played.of([(1, 2), completion], Outcome(({"role": "tool", "content": "4"},), reward=0.5))
    problem = replace(one.problem, record={"question": "q", "n": np.int64(3), "at": np.arange(3)})
    held = replace(one, problem=problem, samples=(replace(one.samples[0], transcript=played),))
    kept = {4: Ahead(Drawn([held], 1, 0), {"time/sample": 1.0}, np.array([-0.5], np.float32))}
    found = drawn_ahead(begin(tmp_path, {FILE: pickle.dumps(kept)}, 3))[4]
    (back,) = found.drawn.groups
    assert back.problem.record["at"].tolist() == [0, 1, 2] and back.samples == held.samples
    assert back.samples[0].transcript.outcome == played.outcome  # type: ignore[attr-defined]
    assert found.logprobs is not None and found.logprobs.tobytes() == kept[4].logprobs.tobytes()  # type: ignore[union-attr]
    for evil in (Path, time.sleep, contextlib.ExitStack, Lagging._prove):
        with pytest.raises(UserError, match=f"{FILE} cannot be read: it holds a .*, which is no plain data"):
            drawn_ahead(begin(tmp_path, {FILE: pickle.dumps({4: evil})}, 3))
    (tmp_path / FILE).unlink()
    with pytest.raises(UserError, match="No such file"):
        drawn_ahead(begin(tmp_path, {}, 3))
    assert drawn_ahead(begin(tmp_path, {}, 0)) == {} == drawn_ahead(Start(None, False, ()))


def test_the_loop_saves_what_is_ahead() -> None:
    fake, saved = Slow(), list[Progress]()
    run = loop(fake, Told(), (0.25, 0.5), 3, 0, saved)
    files = list[dict[str, bytes]]()
    run.checkpoints.save = lambda state, digest, held: files.append(held)  # type: ignore[method-assign,assign,misc]
    replace(run, step=Lagging(fake.steps(), 1, 1, None, False, None)).run(Progress())
    (held,) = files
    assert held.keys() == {FILE}


@pytest.mark.parametrize("lag", [1, 2])
def test_one_digest(lag: int, mesh: DeviceMesh) -> None:
    """With a real engine and a real trainer: in turn, at once, in other micro-batches, and where the run was stopped."""
    keys = (f"algorithm.lag={lag}", "algorithm.mini_batches=2", "trainer.lr=1e-2")

    def run(micro_leaves: int, at_once: bool, first: int, left: Run | None, ready: Any) -> tuple[Run, Lagging, list]:
        one = Run(mesh, keys, micro_leaves, left)
        step = Lagging(one.step, lag, 1, None, at_once, ready)
        step.publish(first - 1)
        return one, step, [plain(step(n, show=False)[0]) for n in range(first, (3 if left is None else 5) + 1)]

    whole, step, told = run(1, False, 1, None, None)
    told += [plain(step(n, show=False)[0]) for n in (4, 5)]
    assert all(m["divergence/tokens_nonzero"] == 0 and m["divergence/tokens_compared"] > 0 for m in told)
    assert told[-1]["off_policy/ratio_min"] < 1 < told[-1]["off_policy/ratio_max"]
    cut, ahead, before = run(4, True, 1, None, None)
    ahead.ahead()
    rest, _, after = run(2, True, 4, cut, ahead._ready)
    assert before + after == told and rest.digest() == whole.digest()
    newest = Run(mesh, keys, 1)
    newest.steps(1, 5)
    assert newest.digest() != whole.digest()


@pytest.mark.slow
def test_a_run_is_one_hash_at_once_in_turn_and_killed(tmp_path: Path) -> None:
    """Whole runs, and their logs: how old every step's samples are, and that all were compared."""
    keys = ("algorithm.lag=2", "steps=4", "checkpoint.keep=9")
    chosen = [
        Layout("float32", 1, 4, "none", "none", 1, 1, "split", False),
        Layout("float32", 2, 2, "none", "optimizer", 2, 1, "colocated", True),
    ]
    rows = list(prove(chosen, keys, tmp_path, 512))
    assert not against(rows) and rows[0].compared == rows[1].compared > 0
    for i in range(len(chosen)):
        steps = [row for row in read_lines(tmp_path / str(i) / "metrics.jsonl") if "policy/version_lag" in row]
        assert [row["policy/version_lag"] for row in steps] == [0, 1, 2, 2]
        assert all(row["divergence/tokens_compared"] > 0 for row in steps)


@pytest.mark.parametrize(
    "keys", [("mode=rollout_only",), ("align.keep_batches=[1]",)], ids=["half a run", "kept batches"]
)
def test_what_lag_cannot_be_with(keys: tuple[str, ...], tmp_path: Path) -> None:
    (config,) = check([*SMALL, "algorithm.lag=1", f"out_dir={tmp_path / 'run'}", *keys])
    with pytest.raises(UserError, match=r"with algorithm.lag=1: a batch is drawn by older weights"):
        prepare(config)
