"""Where a process has its tensors: two that have them in one place can open each other's memory."""

import platform
from dataclasses import dataclass

import torch

HOST = platform.node()
"""This host's name, where a run has one host."""

_host = HOST  # as this process was told; two hosts may have one name, and no two the same address


@dataclass(frozen=True)
class Place:
    """Names a host (by the address at which the others reach it, or as HOST), and one of its cards by number, or None for the
    memory of the host itself."""

    host: str
    card: int | None = None

    @classmethod
    def here(cls, device: str) -> "Place":
        """Returns the place of this process's tensors on `device` ("cpu", or "cuda": the current card)."""
        return cls(_host, torch.cuda.current_device() if device == "cuda" else None)

    def enter(self) -> None:
        """Makes this process one of this place: `here` answers with its host, and its card is the current one."""
        global _host
        _host = self.host
        if self.card is not None:
            torch.cuda.set_device(self.card)

    def __str__(self) -> str:
        return self.host if self.card is None else f"card {self.card} of {self.host}"
