"""Measures how long each phase of a step took, and when each side was busy."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Side = Literal["sampler", "trainer", "both", "none"]
_SINCE = time.time() - time.perf_counter()


@dataclass(frozen=True)
class Span:
    """Says from when to when a phase went on, and which side was busy with it."""

    side: Side
    phase: str
    start: float  # in seconds, on the driver's monotonic clock, which was set to the time of day when the driver began
    end: float


class Clock:
    """Adds up the seconds of each phase of a step, and keeps their spans. Two threads may have a clock each and one list."""

    def __init__(self, spans: list[Span] | None = None) -> None:
        """`spans`: where to keep them; None: in a list of its own."""
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = [] if spans is None else spans
        self._begun = time.perf_counter()

    def told(self) -> dict[str, Any]:
        """Returns the seconds of every phase, and what `whole` says."""
        return self.seconds | self.whole()

    def whole(self) -> dict[str, Any]:
        """Returns the seconds since the clock began as `time/step`, what each side was busy in them, and the spans."""
        step = time.perf_counter() - self._begun
        busy = {f"time/{side}_busy": busy_seconds(self.spans, side) for side in ("sampler", "trainer")}
        longer = max(busy.values())
        ratio = {"time/step_over_longer_half": step / longer} if longer else {}
        rows = [[s.side, s.phase, round(s.start, 4), round(s.end, 4)] for s in self.spans]
        return {"time/step": step} | busy | ratio | {"time/spans": rows}

    @contextlib.contextmanager
    def __call__(self, phase: str, of: Side = "trainer") -> Iterator[None]:
        """Measures what is done within, which is of one side, of both or of none (that one waits)."""
        start, name = time.perf_counter(), f"time/{phase}"
        yield
        end = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + end - start
        self.spans.append(Span(of, phase, _SINCE + start, _SINCE + end))


def busy_seconds(spans: Sequence[Span], side: str) -> float:
    """Adds up the spans of a side alone: those of both are what neither can do meanwhile."""
    return sum((span.end - span.start for span in spans if span.side == side), 0.0)
