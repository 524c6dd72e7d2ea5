"""The processes of a run's Ray: found by a tag in their environment, and ended with the driver, however it ends.

`python family.py TAG LOG` waits until its standard input ends, which a driver that is killed cannot prevent, and ends them. It
also tells of the end, where the driver had not said that it would.
"""

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil

TAG = "SAMEBIT_RUN"  # in the environment of the Ray processes that a run starts
FAREWELL = b"over"  # from a driver that says itself why it ends
WORDLESS = (
    "the run's process ended without a word: it was killed (exit code 137; for want of memory, say), or ended by Ray (exit "
    "code 1), whose raylet or GCS was lost"
)


def family(tag: str, known: set[psutil.Process]) -> set[psutil.Process]:
    """Finds the living among `known`, what carries `tag` in its environment, and their descendants.

    Some of Ray's processes write their title over their environment: they are found as descendants, while the process that
    started them lives, and by `known` after that.
    """
    found, parents = set[psutil.Process](), dict[psutil.Process, int]()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            if process.status() != psutil.STATUS_ZOMBIE:
                parents[process] = process.ppid()
                if process in known or process.environ().get(TAG) == tag:
                    found.add(process)
    while more := {p for p, parent in parents.items() if parent in {f.pid for f in found}} - found:
        found |= more
    return found


def end(tag: str, left: set[psutil.Process], patience: float) -> None:
    """Waits until none of them is left; kills them after `patience` seconds."""
    start = time.monotonic()
    while (left := family(tag, left)) and (waited := time.monotonic() - start) < 15:
        for process in left if waited > patience else ():
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)


@contextlib.contextmanager
def guarded(tag: str, log: Path) -> Iterator[None]:
    """Starts the process that ends the family of a driver that is killed, and tells of it on stderr and in `log`. Ray ends its
    own then, but for two agents, which look for the others for a minute. Ray kills as well: a driver that reads or writes a
    Ray object once the raylet is lost ends there and then, with code 1, and no Python of it runs any more."""
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, tag, log],  # by its path: as a module it would import all of this package
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # an interrupt from the keyboard is the driver's to handle
    )
    try:
        yield
    finally:
        try:
            process.communicate(FAREWELL, timeout=60)
        except subprocess.TimeoutExpired:  # a forked process that hangs holds the pipe too
            process.kill()


def guard(tag: str, log: Path) -> None:
    """Gets to know the family while the driver lives, and ends it afterwards."""
    known, pause = set[psutil.Process](), 0.5
    while not select.select([sys.stdin], [], [], pause)[0]:
        known, pause = family(tag, known), min(2 * pause, 15.0)
    if sys.stdin.buffer.read() != FAREWELL:
        tell(WORDLESS, log)
    end(tag, known, patience=2)


def tell(line: str, log: Path) -> None:
    """Says what the driver would have said, as it would have: on stderr, and in its log where it had begun one."""
    with contextlib.suppress(OSError):  # of a terminal that was closed
        print("samebit: error:", line, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # of a full disk, or none was begun
        with open(log, "r+", encoding="utf-8") as file:
            file.seek(0, 2)
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}  stopped: {line}\n")


if __name__ == "__main__":
    guard(sys.argv[1], Path(sys.argv[2]))
