"""Where a process has its tensors: two that have them in one place can open each other's memory."""

import platform
from dataclasses import dataclass

import torch

HOST = platform.node()
"""This host's name, where a run has one host."""


@dataclass(frozen=True)
class Place:
    """Names a host (by the address at which the others reach it, or as HOST), and one of its cards by number, or None for the
    memory of the host itself."""

    host: str
    card: int | None = None

    def enter(self) -> None:
        """Makes the card of this place, if it has one, the current one of this process."""
        if self.card is not None:
            torch.cuda.set_device(self.card)

    def __str__(self) -> str:
        return self.host if self.card is None else f"card {self.card} of {self.host}"
