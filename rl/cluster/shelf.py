"""The files of a run on one node: what a Ray actor on each node answers, and what nodes give each other.

A node asks another's actor for pieces of a file, and hashes what came.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from kernels.weights.tensor_file import WrittenFile
from trainer import checkpoint, folder
from trainer.checkpoint import CheckpointError, finish, folders

PIECE = 16 * 2**20  # bytes that two nodes hand over at once

Ask = Callable[[str, int, int], bytes]
"""(path, offset, bytes at most) -> bytes of a file on another node."""


class Shelf:
    """Reads and writes files of this node. CheckpointError says what cannot be, in one line."""

    def sees(self, path: str, content: bytes) -> bool:
        """Says whether this node sees a file that another one has just written."""
        with contextlib.suppress(OSError):
            with contextlib.suppress(OSError):
                os.listdir(Path(path).parent)  # lets NFS ask its server what the folder holds
            return Path(path).read_bytes() == content
        return False

    def clear(self, root: str) -> None:
        """Removes what a killed run left half made in `root`."""
        folder.clear(Path(root))

    def holds(self, where: str, files: Sequence[WrittenFile]) -> list[str]:
        """Names those of `files` that are in the folder `where`, by size and SHA-256."""
        return [file.name for file in files if not checkpoint.problem(Path(where) / file.name, file)]

    def listing(self, where: str) -> list[WrittenFile]:
        """Describes every file below the folder `where`, by paths inside it; none where there is no folder."""
        root = Path(where)
        return [_described(root, path) for path in sorted(root.rglob("*")) if path.is_file()]

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Returns up to `size` bytes of a file from `offset` on."""
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None

    def bring(self, where: str, files: Sequence[WrittenFile], sources: Sequence[Any]) -> None:
        """Copies each of `files`, of the folder `where`, from the same path on another node (`sources`: its actor)."""
        for file, source in zip(files, sources, strict=True):

            def ask(path: str, offset: int, size: int, source: Any = source) -> bytes:
                return ray.get(source.read.remote(path, offset, size))

            copy(Path(where) / file.name, file, ask)

    def finish(self, temporary: str, final: str, manifest: str) -> None:
        """Gives the folder of this node's shards its name, with the manifest beside them. Where another node that shares this
        one's files has done so, nothing is left to do."""
        try:
            if not Path(temporary).exists() and _text(Path(final) / checkpoint.MANIFEST) == manifest:
                return
            finish(Path(temporary), Path(final), manifest, {})
        except OSError as error:
            raise CheckpointError(f"the checkpoint {final} could not be written: {error.strerror}") from None

    def prune(self, root: str, newest: str, keep: int) -> None:
        """Leaves of the checkpoints in `root` up to the one named `newest` the last `keep`."""
        for old in [p for p in folders(Path(root)) if p.name <= newest][keep:]:
            folder.remove(old)

    def copy_folder(self, where: str, source: Any) -> None:
        """Copies a folder from the same path on another node, whole or not at all."""
        files = ray.get(source.listing.remote(where))
        if self.listing(where) == files:
            return
        try:
            with folder.whole(Path(where)) as made:
                for file in files:

                    def ask(path: str, offset: int, size: int, name: str = file.name) -> bytes:
                        return ray.get(source.read.remote(f"{where}/{name}", offset, size))

                    copy(made / file.name, file, ask)
        except OSError as error:
            raise CheckpointError(f"{where} could not be written: {error.strerror}") from None


def copy(path: Path, file: WrittenFile, ask: Ask) -> None:
    """Writes `file` at `path`, whole or not at all, by pieces that `ask` returns of the same path elsewhere. CheckpointError
    where what came is not what was written."""
    made = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(made, "wb") as out:
            for offset in range(0, file.bytes, PIECE):
                piece = ask(str(path), offset, PIECE)
                digest.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
        if (found := digest.hexdigest()) != file.sha256:
            raise CheckpointError(
                f"{path} came with sha256 {found[:12]} from another node, it must be {file.sha256[:12]}"
            )
        os.replace(made, path)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror}") from None
    finally:
        made.unlink(missing_ok=True)


def _described(root: Path, path: Path) -> WrittenFile:
    with open(path, "rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return WrittenFile(str(path.relative_to(root)), path.stat().st_size, sha256)


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None
