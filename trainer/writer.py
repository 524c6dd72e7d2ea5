"""A thread that writes one rank's shard while the next step runs."""

import math
from collections.abc import Mapping
from pathlib import Path
from threading import Thread

import torch

from kernels.weights.tensor_file import WrittenFile, write_tensors
from trainer.checkpoint import CheckpointError


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError, which names the first of `tensors` (PART.NAME, as in a checkpoint) that holds a NaN or an
    infinity."""
    for key, held in tensors.items():
        if held.numel() and not all(math.isfinite(end) for end in map(float, held.aminmax())):
            part, _, name = key.partition(".")
            what = "weight" if part == "weight" else f"{part} moment"
            raise CheckpointError(f"the {what} of {name} is not finite")


class ShardWriter:
    """Writes one file at a time: `start` waits for the one before. What goes wrong in the thread is raised by the next call."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._written: WrittenFile | None = None
        self._error: Exception | None = None

    def start(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Starts to write a file. `tensors`: float32, on the CPU, and nobody else's."""
        self.result(wait=True)
        self._written = None
        self._thread = Thread(target=self._write, args=(path, tensors), name="checkpoint", daemon=True)
        self._thread.start()

    def result(self, wait: bool) -> WrittenFile | None:
        """Returns the last file, once it is on the disk; None before."""
        if self._thread is not None and (wait or not self._thread.is_alive()):
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"the checkpoint could not be written: {reason}") from error
        return None if self._thread is not None else self._written

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        try:
            check_finite(tensors)
            path.parent.mkdir(parents=True, exist_ok=True)  # on a node that does not see the driver's
            shapes = {name: tuple(t.shape) for name, t in tensors.items()}
            self._written = write_tensors(path, shapes, torch.float32, tensors.items())
        except Exception as error:  # a thread has nobody to raise to; `result` does
            self._error = error
