"""Which batches of a run stay: those that are asked for, with weights, and the first in which a log-prob differs."""

from pathlib import Path

import numpy as np
import pytest

from rl.errors import RunError
from rl.replay import kept
from rl.replay.keeper import Keeper
from tests.model.shapes import TINY
from tests.rl.replay.test_sides import batch_of

ABOUT = {"numerics": "exact", "dtype": "float32", "device": "cpu"}


def keeper(folder: Path, asked: set[int], said: list[str]) -> Keeper:
    return Keeper(folder, asked.__contains__, ABOUT, lambda path: Path(path).mkdir(), said.append)


def flipped(logprobs: np.ndarray) -> np.ndarray:
    out = logprobs.copy()
    out.view(np.uint32)[1] ^= 1
    return out


def test_what_is_asked_for_stays_with_weights_and_both_log_probs(tmp_path: Path) -> None:
    said: list[str] = []
    keeping, batch = keeper(tmp_path, {2}, said), batch_of(TINY)
    for step in (1, 2, 3):
        keeping.sampled(step, batch)
        keeping.trained(step, batch, batch.logprobs)
    (folder,) = kept.folders(tmp_path)
    found = kept.read(folder)
    assert (folder.name, found.step, found.differing, said) == ("00000002", 2, 0, [])
    assert (folder / "model").is_dir() and found.trainer_logprobs is not None
    for name in ("token_ids", "rows", "temperatures", "top_k", "versions"):
        assert np.array_equal(getattr(found.batch, name), getattr(batch, name)), name


def test_the_first_that_differs_stays_by_itself_and_no_other(tmp_path: Path) -> None:
    """Of a batch whose first update is on a part of it, the rows of that part are compared."""
    said: list[str] = []
    keeping, batch = keeper(tmp_path, set(), said), batch_of(TINY)
    part = batch.logprobs[:7]
    for step, logprobs in ((1, part), (2, flipped(part)), (3, flipped(part))):
        keeping.sampled(step, batch)
        keeping.trained(step, batch, logprobs)
    (folder,) = kept.folders(tmp_path)
    found = kept.read(folder)
    assert (found.step, found.differing) == (2, 1) and not (folder / "model").exists()
    assert len(said) == 1 and said[0].startswith("step 2: its batch is kept: python -m rl.replay ")


def test_one_that_is_asked_for_and_differs_is_told_of(tmp_path: Path) -> None:
    said: list[str] = []
    keeping, batch = keeper(tmp_path, {1}, said), batch_of(TINY)
    keeping.sampled(1, batch)
    keeping.trained(1, batch, flipped(batch.logprobs))
    assert kept.read(kept.folders(tmp_path)[0]).differing == 1 and len(said) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "batches").write_text("a file")
    with pytest.raises(RunError, match="the batch of step 1 could not be kept in"):
        keeper(tmp_path, {1}, []).sampled(1, batch_of(TINY))
