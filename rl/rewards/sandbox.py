"""Runs one program under limits, as a script of its own (`code.py` starts it): reads from stdin what to run, as JSON.

It imports nothing of samebit. `code.py` says what this does not protect from.
"""

import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import sys
import tempfile
from typing import Any

_NEW_USER, _NEW_NETWORK, _DIES_WITH_PARENT = 0x10000000, 0x40000000, 1  # of unshare(2) and prctl(2)
_REFUSED = (
    *("socket.", "subprocess.", "ctypes.", "pty."),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill"),
)
_WRITES = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate"),
    *("os.chmod", "os.chown", "os.link", "os.symlink"),
)


def main() -> None:
    """Runs `program`, then `test`, each in the names that the one before left; writes `done` where both went through."""
    job = json.load(sys.stdin)
    given = tempfile.TemporaryFile()  # noqa: SIM115
    given.write(job["stdin"].encode("utf-8", "surrogatepass"))
    given.seek(0)
    os.dup2(given.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    _limit(job["seconds"], job["memory"], job["file"])
    random.seed(0)
    done, names = job["done"], {"__name__": job["name"]}
    sys.addaudithook(_hook(os.getcwd()))
    exec(compile(job["program"], "<program>", "exec"), names)
    exec(compile(job["test"], "<test>", "exec"), names)
    sys.stdout.write(done)


def _limit(seconds: int, memory: int, file: int) -> None:
    libc = ctypes.CDLL(None)
    if sys.platform == "linux":
        libc.prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        # Where the kernel lets a user do so; the hook refuses sockets in any case
        libc.unshare(_NEW_USER | _NEW_NETWORK)
    for what, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file, file),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        most = resource.getrlimit(what)[1]
        with contextlib.suppress(ValueError):  # a lower one holds already
            resource.setrlimit(
                what, (soft, hard) if most == resource.RLIM_INFINITY else (min(soft, most), min(hard, most))
            )


def _hook(folder: str) -> Any:
    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            _check(arguments[0])
        elif event in _WRITES:
            for path in arguments[:2]:
                _check(path)

    def _check(path: Any) -> None:
        if isinstance(path, str | bytes) and not os.path.realpath(os.fsdecode(path)).startswith(folder + os.sep):
            raise PermissionError(f"{path!r} is outside of the folder of the program")

    return refuse


if __name__ == "__main__":
    main()
