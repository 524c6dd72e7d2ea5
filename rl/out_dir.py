"""The folder of a run: whether it can be one, and whose it is."""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rl.errors import UserError
from trainer import folder

LOCK = ".lock"
"""The file of a run's folder that whoever writes there has locked."""


def check_out_dir(out_dir: Path) -> None:
    """Raises UserError where the folder cannot become a folder of this run's own."""
    try:
        nearest = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    except OSError as error:
        raise UserError(f"out_dir={out_dir} cannot be read: {error.strerror}") from None
    if not nearest.is_dir():
        raise UserError(f"out_dir={out_dir} cannot be made: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"out_dir={out_dir} cannot be made: {nearest} is not writable")


@contextlib.contextmanager
def claim(out_dir: Path) -> Iterator[Path]:
    """Makes the folder and keeps other runs out of it until this one ends, however it ends. A folder in which nothing was
    written is removed, and so is what a killed run left half made."""
    check_out_dir(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        handle = _locked(out_dir / LOCK)
    except BlockingIOError:
        raise UserError(f"out_dir={out_dir} is in use by another process: choose another or wait for its end") from None
    except OSError as error:
        raise UserError(f"out_dir={out_dir} cannot be made: {error.strerror}") from None
    try:
        for parent in (out_dir, out_dir / "checkpoints"):
            folder.clear(parent)
        yield out_dir
    finally:
        for parent in (out_dir, out_dir / "checkpoints"):
            folder.clear(parent)
        with contextlib.suppress(OSError):
            (out_dir / "checkpoints").rmdir()  # does nothing to a folder that holds something
        with contextlib.suppress(OSError):
            (out_dir / LOCK).unlink()
        with contextlib.suppress(OSError):
            out_dir.rmdir()
        os.close(handle)


def _locked(path: Path) -> int:
    """Opens the file, and locks it for as long as the handle is open: the system lets go of it when this process dies. It is a
    file and no folder, whose lock NFS would keep from other hosts. BlockingIOError where another process has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # the latter from some network file systems
                os.close(handle)
                raise BlockingIOError from None
            print(
                f"samebit: warning: {path.parent} is on a file system without locks ({error.strerror}): nothing keeps a second "
                f"run out of it",
                file=sys.stderr,
            )
            return handle
        with contextlib.suppress(FileNotFoundError):  # the one who had it removed it at its end
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)
