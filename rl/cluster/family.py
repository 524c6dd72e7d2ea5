"""The processes of a run's Ray: found by a tag in their environment, and ended with the driver, however it ends.

`python -m rl.family TAG` waits until its standard input ends, which a driver that is killed cannot prevent, and ends them.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TAG = "SAMEBIT_RUN"  # in the environment of the Ray processes that a run starts

Process = tuple[int, str]  # its id, and when it started: an id is used again


def family(tag: str, known: set[Process]) -> set[Process]:
    """The living among `known`, what carries `tag` in its environment, and their descendants. Empty elsewhere than on Linux.

    Some of Ray's processes write their title over their environment: they are found as descendants, while the process that
    started them lives, and by `known` after that.
    """
    mark, found = f"{TAG}={tag}".encode(), set()
    living: dict[int, tuple[int, Process]] = {}  # id -> parent's id, process
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            process = (int(folder.name), fields[19])
            if fields[0] != "Z":
                living[process[0]] = int(fields[1]), process
                if process in known or mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(process)
    ids = {pid for pid, _ in found}
    while more := {process for parent, process in living.values() if parent in ids} - found:
        found |= more
        ids |= {pid for pid, _ in more}
    return found


def end(tag: str, left: set[Process], patience: float) -> None:
    """Waits until none of them is left; kills them after `patience` seconds."""
    start = time.monotonic()
    while (left := family(tag, left)) and (waited := time.monotonic() - start) < 15:
        for pid, _ in left if waited > patience else ():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


@contextlib.contextmanager
def guarded(tag: str) -> Iterator[None]:
    """Starts the process that ends the family of a driver that is killed. Ray ends its own then, but for two agents, which
    look for the others for a minute."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rl.family", tag],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        start_new_session=True,  # an interrupt from the keyboard is the driver's to handle
    )
    try:
        yield
    finally:
        process.communicate()


def guard(tag: str) -> None:
    """Gets to know the family while the driver lives, and ends it afterwards."""
    known, pause = set[Process](), 0.5
    while not select.select([sys.stdin], [], [], pause)[0]:
        known, pause = family(tag, known), min(2 * pause, 15.0)
    end(tag, known, patience=2)


if __name__ == "__main__":
    guard(sys.argv[1])
