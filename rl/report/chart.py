"""Lays out one chart: a series of numbers or several, and the axes that page.html draws them on as SVG.

Every chart has the same size, so that a grid of them lines up; text is drawn at the size at which a 400-wide chart is shown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BOX = {"width": 400, "height": 210, "left": 52, "right": 388, "top": 14, "bottom": 176}
"""Pixels: of the whole, and where its lines are."""
MARKS = 240
"""At most about this many points a line, and places where values can be read: more than there are pixels helps nobody."""
DECADES = 12
"""What a logarithmic axis shows at most; smaller values lie near 0."""

Point = tuple[float, float | None]
"""(x, value); None is a value that was not finite."""


@dataclass(frozen=True)
class Series:
    """Names the points of one line of a chart, and says how it looks."""

    name: str
    points: Sequence[Point]
    color: int = 0  # of the CSS variables --c0 ...
    look: str = "line"  # CSS classes; with "bars" it is drawn as bars, and with "dots" every point is seen


class Chart:
    """Holds what there is to draw.

    The axis of values reaches 0, and `ceiling` where given; a logarithmic one (of values that are not negative) is linear from
    0 to the decade of the smallest. `names` are those of the x 0, 1, 2 ... `flat` is what to say where every value is 0 and
    that is the result. A value that was not finite is a red cross at the top, never a gap."""

    def __init__(
        self,
        title: str,
        unit: str,
        series: Sequence[Series],
        x_name: str = "step",
        names: Sequence[str] = (),
        caption: str = "",
        flat: str = "",
        log: bool = False,
        percent: bool = False,
        ceiling: float = 0.0,
    ) -> None:
        self.title, self.unit, self.x_name, self.caption = title, unit, x_name, caption
        self._names, self._percent = names, percent
        self.series = [s for s in series if s.points]
        values = [v for s in self.series for _, v in s.points]
        finite = [v for v in values if v is not None]
        self.broken = len(finite) < len(values)
        self.flat = "" if any(finite) or self.broken else flat
        self._xs = sorted({x for s in self.series for x, _ in s.points}) or [0.0]
        room = 0.5 if any("bars" in s.look for s in self.series) else 0.0
        self._ends = self._xs[0] - room, self._xs[-1] + room
        low = min([0.0, *finite])
        self._least, self.ticks = 0.0, ticks(low, max([ceiling, *finite]) or float(not low))
        if log and any(finite):
            top = math.ceil(math.log10(max(finite)) - 1e-9)
            bottom = max(math.floor(math.log10(min(v for v in finite if v > 0)) + 1e-9), top - DECADES)
            self._least = float(f"1e{min(bottom, top - 1)}")
            self.ticks = [0.0, *(float(f"1e{e}") for e in range(top, bottom - 1, -math.ceil((top - bottom + 1) / 5)))]

    def px(self, x: float) -> float:
        """Returns the pixel of an x, from the left."""
        (low, high), left, right = self._ends, BOX["left"], BOX["right"]
        return round(left + (right - left) * ((x - low) / (high - low) if high > low else 0.5), 1)

    def py(self, value: float) -> float:
        """Returns the pixel of a value, from the top."""
        low, high, here = (self._bent(v) for v in (min(self.ticks), max(self.ticks), value))
        return round(BOX["bottom"] - (BOX["bottom"] - BOX["top"]) * (here - low) / (high - low), 1)

    def _bent(self, value: float) -> float:
        if not self._least:
            return value
        return 1 + math.log10(value / self._least) if value > self._least else value / self._least

    def y_ticks(self) -> list[tuple[float, str]]:
        """Lists the pixel and the text of every mark of the axis of values."""
        rounded = [float(f"{tick:.10g}") for tick in self.ticks]
        return [(self.py(t), f"{t * 100:.4g} %" if self._percent else number(t)) for t in rounded]

    def x_ticks(self) -> list[tuple[float, str]]:
        """Lists the pixel and the text of every mark below the chart: whole steps, or names as far as they fit."""
        if self._names:
            every = math.ceil(len(self._names) * max(map(len, self._names)) / 48)  # letters that fit in a row
            return [(self.px(i), name) for i, name in enumerate(self._names) if i % every == 0]
        low, high = self._xs[0], self._xs[-1]
        marks = [t for t in ticks(low, high, 5) if low <= t <= high and t == int(t)] if high > low else [low]
        return [(self.px(t), number(t)) for t in marks]

    def stretches(self, series: Series) -> list[list[tuple[float, float]]]:
        """Returns the pixels of a line, cut into pieces where a value was not finite."""
        out: list[list[tuple[float, float]]] = [[]]
        for x, v in thin(series.points):
            if v is None:
                out.append([])
            else:
                out[-1].append((self.px(x), self.py(v)))
        return [piece for piece in out if piece]

    def crosses(self) -> list[float]:
        """Lists the x pixels of values that were not finite."""
        return [self.px(x) for s in self.series for x, v in thin(s.points) if v is None]

    def hover(self) -> dict[str, Any]:
        """Returns what the script shows at each x, thinned by stride: pixels, and text."""
        xs = self._xs[:: math.ceil(len(self._xs) / MARKS)]
        lines = [(s.name, dict(s.points)) for s in self.series]
        return {
            "x": xs,
            "at": [self.px(x) for x in xs],
            "text": [self._names[int(x)] if self._names else number(x) for x in xs],
            "lines": [[name, [self._said(at[x]) if x in at else "" for x in xs]] for name, at in lines],
        }

    def _said(self, value: float | None) -> str:
        return f"{value * 100:.1f} %" if self._percent and value is not None else number(value)


def number(value: float | None) -> str:
    """Writes a value as people read it: 0, 12,345, 0.1234, 1.2e-5, or `not finite`."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Finds round numbers (1, 2, 2.5, 5 times a power of ten) that cover [low, high] in about `count` intervals."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [i * size for i in range(first, last + 1)]


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Computes the mean of the last `window` finite values at every step that has one."""
    finite = [(x, v) for x, v in points if v is not None]
    recent = [[v for _, v in finite[max(0, i + 1 - window) : i + 1]] for i in range(len(finite))]
    return [(x, math.fsum(values) / len(values)) for (x, _), values in zip(finite, recent, strict=True)]


def thin(points: Sequence[Point], limit: int = MARKS) -> list[Point]:
    """Keeps at most about `limit` points, with the lowest, the highest and any non-finite value of every stretch of steps."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    buckets = limit // 2
    for b in range(buckets):
        stretch = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        bad = [p for p in stretch if p[1] is None][:1]
        good = sorted((p for p in stretch if p[1] is not None), key=lambda p: p[1] or 0.0)
        kept += sorted({*bad, *good[:1], *good[-1:]}, key=lambda p: p[0])
    return kept
