"""Where a process has its tensors: two that have them in one place can open each other's memory."""

import platform
from dataclasses import dataclass

import torch

HOST = platform.node()
"""This host's name."""


@dataclass(frozen=True)
class Place:
    """Names a host, and one of its cards by number, or None for the memory of the host itself."""

    host: str
    card: int | None = None

    @classmethod
    def here(cls, device: str) -> "Place":
        """Returns the place of this process's tensors on `device` ("cpu", or "cuda": the current card)."""
        return cls(HOST, torch.cuda.current_device() if device == "cuda" else None)

    def __str__(self) -> str:
        return self.host if self.card is None else f"card {self.card} of {self.host}"
