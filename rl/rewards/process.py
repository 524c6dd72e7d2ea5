"""Starts and ends a process that judges (`worker.py`)."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from rl.rewards.worker import Call, Wanted

_START = (
    "import sys, json, importlib; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[3]).main(int(sys.argv[2]))"
)

_FAREWELL = 2.0  # seconds in which it may end by itself


class JudgeError(Exception):
    """Says what a judge did in place of judging, as the end of "the reward ..."."""


class Process:
    """Imports functions and calls them, in a process that sees the modules that this one sees; it ends with this one.

    Whatever is asked of it is answered by one `receive`, the import first.
    """

    def __init__(self, wanted: Sequence[Wanted], worker: str = "rl.rewards.worker") -> None:
        """Begins to import what is `wanted`. `worker`: the module whose `main` serves the pipe there."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", _START, json.dumps(sys.path), str(theirs.fileno()), worker],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt from the keyboard is the run's to handle
            )
        self.pipe = Connection(ours.detach())
        self.close = weakref.finalize(self, _end, self._process, self.pipe)
        self.since = time.monotonic()  # when it was last asked
        self._write(list(wanted))

    @property
    def pid(self) -> int:
        """Returns its process id."""
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Tells whether it is gone."""
        return _has_ended(self._process)

    def ask(self, calls: Sequence[Call], limit: float) -> None:
        """Sends calls, of which each async one may take `limit` seconds. JudgeError where the process has ended."""
        self.since = time.monotonic()
        self._write((list(calls), limit))

    def receive(self) -> Any:
        """Returns the answer. JudgeError where the process has ended without one."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise JudgeError(self.how_it_ended()) from None

    def how_it_ended(self) -> str:
        """Waits for its end, ends what it has started, and says how its own end was."""
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        _kill(self._process)
        code = self._process.returncode
        how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        return f"ended its process ({how})"

    def kill(self) -> None:
        """Ends it at once, with what it has started."""
        _kill(self._process)
        self.close()

    def tell(self, message: Any) -> None:
        """Sends what a worker of another kind understands. JudgeError where the process has ended."""
        self._write(message)

    def _write(self, message: Any) -> None:
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise JudgeError(self.how_it_ended()) from None


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Leaves its number taken, and so that of its group: until `_kill` nobody else can have it."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # of a run that was started with SIGCHLD ignored, nothing of a child stays
        return True


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end(process: "subprocess.Popen[bytes]", pipe: Connection) -> None:
    pipe.close()
    end = time.monotonic() + _FAREWELL
    while not _has_ended(process) and time.monotonic() < end:
        time.sleep(0.01)
    _kill(process)
