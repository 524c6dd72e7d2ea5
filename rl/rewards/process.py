"""Runs a user's function in a process of its own (`worker.py`), called as if it were here."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from multiprocessing.connection import Connection
from typing import Any

from rl.data.problem import Problem

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from rl.rewards import worker; "
    "worker.main(int(sys.argv[2]), sys.argv[3])"
)
_PATIENCE = 60.0  # seconds of one call before it is said that it is still under way


class JudgeError(Exception):
    """Says what a judge did in place of judging, as the end of "the reward ..."."""


class UserFunction:
    """Calls `module:function` (problem, text) -> float in a process that sees the modules that this one sees; it ends with
    this one."""

    def __init__(self, name: str) -> None:
        """Imports the module. JudgeError with what that raised."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-c", _START, json.dumps(sys.path), str(theirs.fileno()), name],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # an interrupt from the keyboard is the run's to handle
            )
        self._pipe = Connection(ours.detach())
        self.close = weakref.finalize(self, _end, self._process, self._pipe)
        how, what = self._answer(f"the import of {name}")
        if how == "raised":
            self.close()
            raise JudgeError(what)

    def __call__(self, problem: Problem, text: str) -> float:
        try:
            self._pipe.send((problem, text))
        except (BrokenPipeError, ConnectionResetError):
            raise JudgeError(self._end()) from None
        how, what = self._answer(f"the reward of problem {problem.id!r}")
        if how == "raised":
            raise JudgeError(f"raised {what}")
        return what

    def _answer(self, what: str) -> tuple[str, Any]:
        begun = told = time.monotonic()
        while not self._pipe.poll(1.0):
            if self._process.poll() is not None:  # a process that it has forked may hold the pipe
                raise JudgeError(self._end())
            if (now := time.monotonic()) - told > _PATIENCE:
                told = now
                print(f"still waiting for {what} ({now - begun:.0f} s)", flush=True)
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise JudgeError(self._end()) from None

    def _end(self) -> str:
        code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
        return f"ended its process ({how})"


def _end(process: "subprocess.Popen[bytes]", pipe: Connection) -> None:
    pipe.close()
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
