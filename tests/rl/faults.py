"""Ranks that fail in the middle of their work."""

import os
import signal
from typing import Any

import ray
import torch


def break_in(actor: Any, owner: str, method: str, count: int, how: str) -> None:
    """Call number `count` of actor.owner.method dies, raises, or allocates too much, in host memory or on the card."""

    def install(rank: Any) -> None:
        target = getattr(rank, owner)
        real, calls = getattr(target, method), []

        def broken(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == count:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how.startswith("allocates"):
                    torch.empty(1 << 50, device="cuda" if how == "allocates on the card" else "cpu")
                raise ValueError("boom\nin the middle")
            return real(*arguments)

        setattr(target, method, broken)

    ray.get(actor.__ray_call__.remote(install))
