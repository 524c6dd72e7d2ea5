"""A folder that is there whole or not at all: made under another name, synced to the disk, renamed."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".tmp"


def temporary(final: Path) -> Path:
    """Makes a new folder beside `final`, for `publish`. Its name is its own, so that nobody else writes there."""
    folder = _beside(final)
    folder.mkdir(parents=True)
    return folder


def publish(folder: Path, final: Path) -> None:
    """Turns `folder` into `final`; a kill at any moment leaves `final` as it was, missing, or whole. What stood there goes."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    remove(final)
    try:
        os.rename(folder, final)
    except FileNotFoundError:  # NFS asks again where an answer was lost, and is told that it is done
        if not final.exists():
            raise
    _sync(final.parent)


def remove(final: Path) -> None:
    """Removes `final`, if it is there, under another name: never is a half of it to be seen."""
    old = _beside(final)
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, old)
        shutil.rmtree(old, ignore_errors=True)


def clear(parent: Path) -> None:
    """Removes what a process that was killed left half made in `parent`."""
    for path in parent.glob(f".*{_SUFFIX}"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def whole(final: Path) -> Iterator[Path]:
    """Gives a folder to write in, which becomes `final` at the end, or goes where an error ends it."""
    folder = temporary(final)
    try:
        yield folder
        publish(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}{_SUFFIX}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise  # some network file systems sync files and know nothing of folders
    finally:
        os.close(handle)
