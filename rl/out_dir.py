"""The folder of a run: whether it can be one, and whose it is."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from rl.errors import UserError
from trainer import folder


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
        handle = os.open(out_dir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"out_dir={out_dir} cannot be made: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when this process dies
    except OSError:
        os.close(handle)
        raise UserError(f"out_dir={out_dir} is in use by another process: choose another or wait for its end") from None
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
            out_dir.rmdir()
        os.close(handle)
