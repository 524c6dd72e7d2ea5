"""Says what is judged and what comes of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rl.data.problem import Problem

_LARGEST = 1e30  # of a reward: advantages are float32


@dataclass(frozen=True)
class Claim:
    """Holds a completion that is judged, and its problem."""

    problem: Problem
    text: str
    token_ids: tuple[int, ...] = ()  # of the text; () where it was not sampled
    messages: Sequence[
        Mapping[str, Any]
    ] = ()  # of a conversation with tools, after the prompt; the last one is the text
    state: Mapping[str, Any] | None = None  # public attributes of its environment; None: it has none


@dataclass(frozen=True)
class Found:
    """Says what one reward makes of one claim."""

    value: float | None = None  # None: it has no say
    error: str = ""  # why there is no value, as the end of "the reward ..."
    notes: Mapping[str, Any] = field(default_factory=dict)  # what it says beside the value, by name


@dataclass(frozen=True)
class Verdict:
    """Says what a claim earns."""

    reward: float | None  # the weighted sum; None: nothing judges it
    parts: Mapping[str, float]  # each reward that has a say, by name, before its weight
    notes: Mapping[str, Any] = field(default_factory=dict)  # by "NAME/what"
    error: str = ""  # why it is left out, in a line; "" where nothing failed


def found(value: Any, notes: Mapping[str, Any] | None = None) -> Found:
    """Reads what a reward returned: a number, or None. TypeError or ValueError for anything else."""
    if value is None:
        return Found(None, notes=notes or {})
    number = float(value)
    if not math.isfinite(number):
        return Found(error=f"is {number}, not a number")
    if abs(number) > _LARGEST:
        return Found(error=f"is {number}, beyond {_LARGEST}")
    return Found(number, notes=notes or {})


def raised(error: BaseException) -> str:
    """Says what was raised, whatever it is: its text may be impossible to make."""
    try:
        text = str(error)
    except BaseException:
        text = "and its text cannot be made"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
