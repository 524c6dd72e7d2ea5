"""Failures of a rank's process that other processes tell apart by their type: they are picklable.

Some of them torch says in words alone (its CPU allocator, gloo): the words are read here, in the process in which they were
raised, and nowhere else.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Class = TypeVar("Class", bound=type)

_UNITS = {"bytes": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_SIZE = rf"([\d.]+) ?({'|'.join(_UNITS)})\b"
_ASKED = re.compile(rf"tried to allocate {_SIZE}", re.IGNORECASE)
_FREE = re.compile(rf"of which {_SIZE} is free", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE)
_NO_RANK = re.compile(r"gloo|NCCL|Connection (closed|reset)|another card has not answered")


class OutOfMemory(RuntimeError):
    """Says that an allocation failed, on the host or on a card. `asked`, `free`: bytes; 0 where nothing says."""

    def __init__(self, asked: int, free: int) -> None:
        super().__init__(asked, free)
        self.asked, self.free = asked, free

    def __str__(self) -> str:
        asked = f"{self.asked / 2**30:,.2f} GiB asked for" if self.asked else ""
        free = f"{self.free / 2**30:,.2f} GiB free" if self.free else ""
        return ": ".join(filter(None, ("out of memory", ", ".join(filter(None, (asked, free))))))


class RankLost(RuntimeError):
    """Says that another rank left a collective: that rank's own failure is the cause."""


def typed(error: BaseException) -> OutOfMemory | RankLost | None:
    """Returns the failure that `error` is, or None where it is another one, which has a type of its own."""
    if isinstance(error, OutOfMemory | RankLost):
        return error
    text = f"{error}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError | OSError) and _NO_MEMORY.search(text)
    ):
        return OutOfMemory(_bytes(_ASKED, text), _bytes(_FREE, text))
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError | OSError) and _NO_RANK.search(text)):
        return RankLost(" ".join(text.split()))
    return None


def shortage(error: BaseException) -> OutOfMemory | None:
    """Returns the allocation that failed, where that is what `error` says."""
    found = typed(error)
    return found if isinstance(found, OutOfMemory) else None


def with_typed_failures(actor: Class) -> Class:
    """Decorates a class: every public method raises `typed` failures in the place of torch's."""
    for name in {n for n in dir(actor) if not n.startswith("_") and callable(getattr(actor, n))}:
        setattr(actor, name, _translated(getattr(actor, name)))
    return actor


def _translated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except Exception as error:
            if (known := typed(error)) is not None:
                raise known from error
            raise

    return call


def _bytes(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    return int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
