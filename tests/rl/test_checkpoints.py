"""When a run saves, what it says of itself, and which checkpoints stay. No process is started: a rank of one's own writes."""

import time
from pathlib import Path
from typing import Any

import pytest

from kernels.weights.tensor_file import WrittenFile
from rl.checkpoints import Checkpoints, Progress
from rl.config import CheckpointSection
from rl.errors import RunError, SaveError
from rl.run.log import RunLog
from tests.model.shapes import TINY
from trainer.checkpoint import folder_name, folders, read, verify


class Fleet:
    """A trainer whose shard is done when `ready` says so."""

    def __init__(self) -> None:
        self.ready, self.steps = True, 0

    def snapshot(self, folder: Path) -> int:
        (Path(folder) / "shard").write_bytes(b"x")
        self.steps += 1
        return self.steps

    def written(self, wait: bool) -> list[WrittenFile] | None:
        sha256 = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
        return [WrittenFile("shard", 1, sha256)] if self.ready or wait else None

    def writers_away(self) -> list[str]:
        return [""]

    def finish_away(self, folder: Path, final: Path, manifest: str) -> None:
        assert folder.exists() and not final.exists()

    def prune_away(self, root: Path, newest: str, keep: int) -> None:
        assert (root / newest).exists()


def checkpoints(out_dir: Path, log: RunLog, every: int = 2, keep: int = 2, fleet: Fleet | None = None) -> Checkpoints:
    section, facts = CheckpointSection(every=every, keep=keep), {"identity": {"seed": 0}}
    trainer: Any = fleet or Fleet()
    return Checkpoints(out_dir, section, trainer, TINY, log, time.perf_counter(), {"tokenizer/t.json": b"{}"}, facts)


def steps(out_dir: Path) -> list[str]:
    return [p.name for p in folders(out_dir / "checkpoints")]


def test_when_it_is_due(tmp_path: Path) -> None:
    with RunLog(tmp_path, {}, ()) as log:
        assert [s for s in range(1, 8) if checkpoints(tmp_path, log, every=3).due(s, 7)] == [3, 6, 7]
        assert not any(checkpoints(tmp_path, log, every=0).due(s, 7) for s in range(1, 8))


def test_what_it_says_and_which_ones_stay(tmp_path: Path) -> None:
    with RunLog(tmp_path, {}, ()) as log:
        saved = checkpoints(tmp_path, log)
        for step in range(1, 5):
            log.step(10 + step, {})
            ends = log.positions()
            saved.save(Progress(supervised=10, step=step, cursor=7 * step, accuracy=(0.5,)), f"weights {step}")
            log.step(10 + step, {"later": True})  # belongs to the next step: not to what was saved
            saved.settle(wait=True)
            assert steps(tmp_path) == [folder_name(10 + s) for s in range(step, max(0, step - 2), -1)]
            checkpoint = read(tmp_path / "checkpoints" / folder_name(10 + step))
            verify(checkpoint)
            assert (checkpoint.weights_sha256, checkpoint.optimizer_steps) == (f"weights {step}", step)
            said = Progress(**checkpoint.run["progress"] | {"accuracy": tuple(checkpoint.run["progress"]["accuracy"])})
            assert (said.supervised, said.step, said.cursor, said.accuracy) == (10, step, 7 * step, (0.5,))
            assert said.log == ends and checkpoint.run["identity"] == {"seed": 0}
    assert not list(tmp_path.rglob("*.tmp"))


def test_it_has_its_name_when_all_is_written(tmp_path: Path) -> None:
    fleet = Fleet()
    with RunLog(tmp_path, {}, ()) as log:
        saved = checkpoints(tmp_path, log, fleet=fleet)
        fleet.ready = False
        saved.save(Progress(step=1), "")
        saved.settle()
        assert steps(tmp_path) == []
        saved.save(Progress(step=2), "")  # waits for the one before
        assert steps(tmp_path) == [folder_name(1)]
        fleet.ready = True
        saved.settle()
        saved.settle()
        assert steps(tmp_path) == [folder_name(2), folder_name(1)]


def test_what_a_rank_may_not_write(tmp_path: Path) -> None:
    """The step is named, the checkpoint before it stays, and nothing stands in the place of the new one."""

    class Spoiled(Fleet):
        def written(self, wait: bool) -> list[WrittenFile] | None:
            if self.steps == 2:
                raise SaveError("trainer rank 1: the checkpoint could not be written: the weight of norm is not finite")
            return super().written(wait)

    with RunLog(tmp_path, {}, ()) as log:
        saved = checkpoints(tmp_path, log, fleet=Spoiled())
        saved.save(Progress(step=1), "")
        saved.save(Progress(step=2), "")
        with pytest.raises(RunError, match=r"^step 2: trainer rank 1: .* weight of norm .*; \S+step-00000001 stays"):
            saved.settle(wait=True)
    assert steps(tmp_path) == [folder_name(1)]


def test_a_newer_one_that_was_passed_over_does_not_push_it_out(tmp_path: Path) -> None:
    """A run that goes on from step 1, since its later ones are damaged, keeps what it saves."""
    for step in (5, 6):
        (tmp_path / "checkpoints" / folder_name(step)).mkdir(parents=True)
    with RunLog(tmp_path, {}, ()) as log:
        saved = checkpoints(tmp_path, log)
        for step in (1, 2, 3):
            saved.save(Progress(step=step), "")
        saved.settle(wait=True)
    assert steps(tmp_path)[-2:] == [folder_name(3), folder_name(2)]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with RunLog(tmp_path, {}, ()) as log, pytest.raises(RunError, match="the checkpoint could not be written: "):
        checkpoints(tmp_path, log).save(Progress(step=1), "")
