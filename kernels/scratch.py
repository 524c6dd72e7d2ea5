"""Makes folders that exist only while they are worked in."""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch(inside: Path | None = None) -> Iterator[Path]:
    """Makes a folder for this user alone, and removes it with all that is in it, whatever ends the work.

    `inside`: an existing folder; None: the system's, which TMPDIR names. The name is chosen before the folder is there: a
    signal that raises between the two finds it in `finally`. (Between the end of `tempfile.mkdtemp` and the finalizer of
    `TemporaryDirectory` nobody knows the folder, and a signal leaves it behind.) OSError where it cannot be made."""
    folder = Path(inside or tempfile.gettempdir(), f"samebit-{uuid.uuid4().hex}")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:  # a signal cut that short; where none did, nothing is left to remove
            shutil.rmtree(folder, ignore_errors=True)
