"""The command line under test: in this process, or as a process of its own whose descendants can be found."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from kernels.gpu.card import chosen_family
from rl.command import Prepare, Train

ROOT = Path(__file__).resolve().parents[2]
GSM8K = Path(os.path.relpath(ROOT.parent / "shared" / "data" / "gsm8k"))
ON_CARD = ("device=cuda", f"kernels.family={chosen_family()}")
SHORT = ("steps=2", "warmup.steps=3", "eval.problems=32", "logger=none", "rollout.top_p=0.95", "rollout.min_p=0.001")


def _heard() -> None:
    """A background job ignores Ctrl-C, and one under nohup the end of its terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def error(self, code: int = 2) -> str:
        """The one line of stderr, after its prefix."""
        assert self.code == code, (self.code, self.out, self.err)
        assert "Traceback" not in self.out + self.err
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("samebit: error: "), self.err
        return lines[0].removeprefix("samebit: error: ")


def summary(folder: Path) -> dict[str, Any]:
    """What a run says of itself at its end."""
    read: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return read


def call(*arguments: str, train: Train | None = None, prepare: Prepare | None = None) -> Outcome:
    """The command in this process. Nothing of Ray may start: a test passes a `train` whose processes run already, or a fake."""
    from rl.train import main
    from rl.train import prepare as real_prepare
    from rl.train import train as real_train

    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    code: object = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["rl.train", *arguments]),
        mock.patch("ray.init", side_effect=AssertionError("Ray was started")),
    ):
        try:
            main(train or real_train, prepare or real_prepare)
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    return Outcome(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


class Command:
    """`python -m rl.train` as a process. All its descendants carry a tag in their environment."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self.tag = f"SAMEBIT_TEST={uuid.uuid4().hex}"
        name, value = self.tag.split("=")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rl.train", *arguments],
            cwd=cwd,
            env=os.environ | {name: value, "PYTHONPATH": path, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heard,
        )

    def finish(self, timeout: float = 600) -> Outcome:
        out, err = self.process.communicate(timeout=timeout)
        return Outcome(self.process.returncode, out, err)

    def line(self, start: str) -> None:
        """Waits for a line of stdout."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return
        raise AssertionError(f"no line {start!r}: {self.finish()}")

    def family(self, name: str = "") -> list[int]:
        """Living processes that this one started, by a part of their command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.tag.encode() not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if name.encode() in (folder / "cmdline").read_bytes() and not dead:
                    found.append(int(folder.name))
        return [pid for pid in found if pid != self.process.pid]

    def wait_for(self, name: str, seconds: float = 60) -> list[int]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.family(name):
                return found
            time.sleep(0.05)
        raise AssertionError(f"no process {name!r} within {seconds} s")

    def assert_nothing_left(self, seconds: float = 15) -> None:
        end = time.monotonic() + seconds
        while left := self.family():
            assert time.monotonic() < end, [Path(f"/proc/{p}/cmdline").read_bytes()[:80] for p in left]
            time.sleep(0.1)


@contextlib.contextmanager
def command(*arguments: str, cwd: Path) -> Iterator[Command]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("finds the processes of a run in /proc")
    running = Command(*arguments, cwd=cwd)
    try:
        yield running
    finally:
        running.process.kill()
        for pid in running.family():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        running.process.wait()
        for pipe in (running.process.stdout, running.process.stderr):
            if pipe:
                pipe.close()


# rewards for `reward=tests.rl.command:NAME` ---------------------------------------------------------------------------


def raises(problem: object, text: str) -> float:
    raise KeyError(f"boom\non {text!r}")


def nan(problem: object, text: str) -> float:
    return float("nan")


def huge(problem: object, text: str) -> float:
    return -1e308


def none(problem: object, text: str) -> None:
    return None


def pair(problem: object, text: str) -> list[float]:
    return [1.0, 2.0]


def picky(problem: object, text: str) -> float:
    if text == "bad":
        raise ValueError("no")
    return 1.0


def at_times(problem: object, text: str) -> float:
    if zlib.crc32(text.encode()) % 3 == 0:
        raise ValueError("not this one")
    return float(len(text))


def strange(whatever: object) -> float:
    return 1.0


def length(problem: object, text: str) -> float:
    return float(len(text))


def late(problem: object, text: str, calls: list[int] = []) -> float:  # noqa: B006
    """Raises once the run is under way: after more calls than those that try it out."""
    calls.append(len(text))
    return 1.0 if len(calls) < 100 else float([][0])


def leaves(problem: object, text: str) -> float:
    sys.exit(3)


def dies(problem: object, text: str) -> float:
    os._exit(3)


def crashes(problem: object, text: str) -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0.0


def forks(problem: object, text: str) -> float:
    """Its child holds the pipe on."""
    if os.fork() == 0:
        time.sleep(5)
    os._exit(4)


class Odd(BaseException):
    def __str__(self) -> str:
        raise ValueError


def odd(problem: object, text: str) -> float:
    raise Odd


def right(problem: Any, text: str) -> float:
    return float(text == problem.answer)
