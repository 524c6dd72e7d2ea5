"""A command of this project as a process of its own: its output, its time, and what the cards held meanwhile."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


@dataclass(frozen=True)
class Ended:
    """Says how a command ended."""

    code: int | None  # None: it was killed at its limit
    output: str
    seconds: float
    gib: tuple[float, ...]  # the most that each card held at any moment, whoever held it

    @property
    def last(self) -> str:
        """Returns the last line, which says what was wrong."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")[:300]


class Running:
    """Runs `python -m *arguments`; both streams go to the file `log`. A context manager: on the way out it has ended."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log, self.tag = log, f"SAMEBIT_RECIPE={uuid.uuid4().hex}"
        name, _, value = self.tag.partition("=")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.cards = Cards()
        self.start = time.monotonic()
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=os.environ
                | NO_MULTICAST
                | {"PYTHONPATH": path, "COLUMNS": "160", name: value}
                | (environment or {}),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.cards.stop()

    def finish(self, seconds: float) -> Ended:
        """Waits for the end, at most `seconds` from now."""
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(seconds)
        took = time.monotonic() - self.start
        self.__exit__()
        return Ended(code, self.log.read_text(errors="replace"), took, self.cards.stop())

    def ranks(self, name: str) -> list[int]:
        """Lists the processes of the living Ray actors of this command that are called so."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                title = (folder / "cmdline").read_bytes().startswith(f"ray::{name}".encode())
                if title and self.tag.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return sorted(found)


def run(arguments: Sequence[str], log: Path, seconds: float, environment: dict[str, str] | None = None) -> Ended:
    """Runs a command to its end, or for at most `seconds`."""
    with Running(arguments, log, environment) as running:
        return running.finish(seconds)


class Cards:
    """Watches how much memory each card held at most, by five looks a second; nothing where nvidia-smi is not."""

    def __init__(self) -> None:
        query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
        self.most: dict[int, int] = {}  # MiB
        self.process: subprocess.Popen[str] | None = None
        if shutil.which(query[0]):
            self.process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self.thread = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
            self.thread.start()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            index, _, used = line.partition(",")
            with contextlib.suppress(ValueError):  # "[N/A]"
                self.most[int(index)] = max(self.most.get(int(index), 0), int(used))

    def stop(self) -> tuple[float, ...]:
        """Stops watching; returns the most GiB of each card, in the order of nvidia-smi."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.thread.join()
        return tuple(round(self.most[i] / 1024, 1) for i in sorted(self.most))
