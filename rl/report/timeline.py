"""Lays out when each side of a run was busy in its last steps: a strip for the sampler and one for the trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.report.chart import BOX, number, ticks
from rl.report.folder import Run

STEPS = 4
"""Steps that are shown, the last ones."""
PHASES = {
    "sample": ("samples", 0),
    "score": ("scores", 2),
    "train": ("trains", 1),
    "prove": ("compares", 3),
    "reference": ("asks the frozen model", 3),
    "critic": ("asks the critic", 3),
    "publish": ("publishes", 4),
    "handover": ("hands memory over", 4),
}
"""What a side does in a phase of a step, and its colour."""
SIDES = ("sampler", "trainer")
HEIGHT, _GAP = 44, 14


@dataclass(frozen=True)
class Bar:
    """Holds a rectangle in pixels, its colour, and what is said of it."""

    x: float
    y: float
    width: float
    color: int
    text: str


class Timeline:
    """Holds the strips of one run's last steps that follow each other, over the seconds since the first of them began."""

    def __init__(self, run: Run) -> None:
        self.name, self._rows = run.name, _last(run.rows)
        self._spans = [tuple(span) for row in self._rows for span in row["time/spans"] if span[1] in PHASES]
        self._begun = min((start for *_, start, _ in self._spans), default=0.0)
        self._seconds = max((end for *_, end in self._spans), default=0.0) - self._begun
        self.there = self._seconds > 0
        self.bottom = BOX["top"] + len(SIDES) * HEIGHT + _GAP

    @property
    def caption(self) -> str:
        """Says over how long the longer half of a step was waited for."""
        ratios = [row["time/step_over_longer_half"] for row in self._rows if row.get("time/step_over_longer_half")]
        if not ratios:
            return ""
        mean = sum(ratios) / len(ratios)
        return f"A step took {mean:.2f} of the longer of its halves: 1 where they overlap wholly, 2 where equals take turns."

    def bars(self) -> list[Bar]:
        """Lists what is drawn; a phase that is both sides' stands on both strips."""
        return [
            self._bar(row, side, phase, start, end)
            for of, phase, start, end in self._spans
            for row, side in enumerate(SIDES)
            if of in (side, "both")
        ]

    def _bar(self, row: int, side: str, phase: str, start: float, end: float) -> Bar:
        said, color = PHASES[phase]
        left, y = self.px(start - self._begun), BOX["top"] + row * HEIGHT + 4
        width = max(round(self.px(end - self._begun) - left, 1), 0.5)
        text = f"{side} {said}: {number(start - self._begun)} to {number(end - self._begun)} s"
        return Bar(left, y, width, color, text)

    def px(self, seconds: float) -> float:
        """Returns the pixel of a time, from the left."""
        return round(BOX["left"] + (BOX["right"] - BOX["left"]) * seconds / (self._seconds or 1.0), 1)

    def names(self) -> list[tuple[float, str]]:
        """Lists the pixel and the name of every strip."""
        return [(BOX["top"] + row * HEIGHT + HEIGHT / 2, side) for row, side in enumerate(SIDES)]

    def steps(self) -> list[tuple[float, str]]:
        """Lists where each step begins."""
        begins = [
            (min(start for *_, start, _ in row["time/spans"]), row["x"]) for row in self._rows if row["time/spans"]
        ]
        return [(self.px(max(begin - self._begun, 0.0)), number(x)) for begin, x in begins]

    def x_ticks(self) -> list[tuple[float, str]]:
        """Lists the pixel and the text of every mark of the axis of seconds."""
        return [(self.px(t), number(float(f"{t:.10g}"))) for t in ticks(0.0, self._seconds, 5) if t <= self._seconds]

    def legend(self) -> dict[str, int]:
        """Returns what was done, with its colour."""
        used = {phase for _, phase, _, _ in self._spans}
        return {said: color for phase, (said, color) in PHASES.items() if phase in used}


def timelines(runs: Sequence[Run]) -> list[Timeline]:
    """Makes the time-line of every run that logged one."""
    return [line for run in runs if (line := Timeline(run)).there]


def _last(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the last steps of one process: where a run went on later, the time between is none of its own."""
    last: list[Mapping[str, Any]] = []
    for row in reversed([row for row in rows if row.get("time/spans")]):
        if last and row["x"] != last[0]["x"] - 1:
            break
        last.insert(0, row)
    return last[-STEPS:]
