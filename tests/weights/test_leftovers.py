"""Files in memory that a killed process leaves behind are found by the next run; those of the living stay."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels.host.place import Place
from kernels.weights.bucket import SharedBucket, remove_leftovers

OWNER = """
import sys
from kernels.host.place import Place
from kernels.weights.bucket import SharedBucket
bucket = SharedBucket(1 << 20, Place("here"))
print(bucket.ticket.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of this test's own: on this machine others may run."""
    monkeypatch.setattr("kernels.weights.bucket._MEMORY", tmp_path)
    return tmp_path


def owner(folder: Path) -> tuple[subprocess.Popen, Path]:
    code = f"import kernels.weights.bucket as b, pathlib; b._MEMORY = pathlib.Path({str(folder)!r})\n" + OWNER
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_of_the_dead_and_not_of_the_living(folder: Path) -> None:
    (living, its), (dead, left) = owner(folder), owner(folder)
    mine = SharedBucket(1 << 10, Place("here"))
    dead.kill()
    dead.communicate()
    assert its.exists() and left.exists() and Path(mine.ticket.path).exists()
    assert remove_leftovers() == [(str(left), 2 << 20)]
    assert its.exists() and not left.exists() and Path(mine.ticket.path).exists()
    assert remove_leftovers() == []
    living.kill()
    living.communicate()
    assert remove_leftovers() == [(str(its), 2 << 20)]
    mine.hide()
    assert list(folder.iterdir()) == []


def test_nothing_else_is_touched(folder: Path) -> None:
    (folder / "other").write_bytes(b"x")
    (folder / "samebit-folder").mkdir()
    (folder / "samebit-link").symlink_to(folder / "other")
    assert remove_leftovers() == []
    assert {p.name for p in folder.iterdir()} == {"other", "samebit-folder", "samebit-link"}
