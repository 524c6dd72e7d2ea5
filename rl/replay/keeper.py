"""Keeps the batches of a run that are asked for, and that of the first step in which a log-prob differs in a bit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rl.errors import RunError
from rl.replay.kept import add_trainer, keep
from trainer.batch import Batch


class Keeping(Protocol):
    """Declares what a step tells whoever keeps batches."""

    def sampled(self, step: int, batch: Batch) -> None:
        """Takes a batch before it is trained on: the trainer has the weights that sampled it, and the cards."""

    def trained(self, step: int, batch: Batch, logprobs: np.ndarray) -> None:
        """Takes what the trainer computed for its first rows, float32 [R], in its first update."""


class KeepsNothing:
    """Is told, and does nothing."""

    def sampled(self, step: int, batch: Batch) -> None:
        """Does nothing."""

    def trained(self, step: int, batch: Batch, logprobs: np.ndarray) -> None:
        """Does nothing."""


@dataclass
class Keeper:
    """Keeps batches in `out_dir`. RunError where one cannot be written."""

    out_dir: Path
    asked: Callable[[int], bool]  # whether a step's batch is kept whatever comes of it
    about: Mapping[str, Any]
    save_model: Callable[[str], object] | None  # writes the trainer's weights into a folder
    say: Callable[[str], None]
    _told: bool = field(default=False, init=False)

    def sampled(self, step: int, batch: Batch) -> None:
        """Keeps a batch that is asked for, with the weights that sampled it."""
        if self.asked(step):
            self._keep(step, batch, None, self.save_model)

    def trained(self, step: int, batch: Batch, logprobs: np.ndarray) -> None:
        """Adds what the trainer computed; keeps the first batch in which it is not what the sampler recorded."""
        differ = not np.array_equal(logprobs.view(np.uint32), batch.logprobs[: len(logprobs)].view(np.uint32))
        if self.asked(step):
            add_trainer(self._folder, logprobs)
        elif differ and not self._told:
            self._keep(step, batch, logprobs, None)
        if differ and not self._told:
            self._told = True
            self.say(f"step {step}: its batch is kept: python -m rl.replay {self._folder} names the op that differs")

    def _keep(
        self, step: int, batch: Batch, logprobs: np.ndarray | None, save_model: Callable[[str], object] | None
    ) -> None:
        try:
            self._folder = keep(self.out_dir, step, batch, logprobs, dict(self.about), save_model)
        except OSError as error:
            raise RunError(f"the batch of step {step} could not be kept in {self.out_dir}: {error.strerror}") from None
