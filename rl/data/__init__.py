"""Reads problems: where they come from, how they become tokens, and what judges an answer."""

from typing import TYPE_CHECKING, Any

from rl.data.problem import TRAIN, WARMUP, Judge, Problem, ProblemStream, Source

if TYPE_CHECKING:
    from rl.data.sources import left_out, open_source


def __getattr__(name: str) -> Any:
    """What opens a source is imported when it is asked for: the process of a user's reward needs problems, and no torch."""
    if name not in ("left_out", "open_source"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rl.data import sources

    return getattr(sources, name)
