"""Charts as inline SVG: lines and stacked bars with axes, units, legend and a hover title for every step.

Colours are CSS variables (`--c0` .. `--c3`, `--ink`, ...) that the page defines for light and dark. Every chart has the
same size, so that a grid of them lines up; text is drawn at the size at which a 400-wide chart is shown.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 14, 34
MARKS = 400
"""At most this many points a line, and hover columns a chart: more than there are pixels helps nobody."""
DOTS = 30
"""Above this many points a line shows no dots."""

Point = tuple[float, float | None]
"""(step, value); None is a value that was not finite."""


@dataclass(frozen=True)
class Series:
    """One line, or one layer of a stack."""

    name: str
    points: tuple[Point, ...]
    color: int = 0  # index of the CSS variable
    faint: bool = False  # drawn thin behind the others
    dots: bool = False  # a dot and its value at every point
    dashed: bool = False


def number(value: float | None) -> str:
    """A value as people read it: 0, 12,345, 0.1234, 1.2e-05, or `not finite`."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) that cover [low, high] in about `count` intervals."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [i * size for i in range(first, last + 1)]


def running_mean(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """The mean of the last `window` finite values at every step."""
    means: list[Point] = []
    recent: list[float] = []
    for step, value in points:
        if value is not None:
            recent = [*recent, value][-window:]
            means.append((step, sum(recent) / len(recent)))
    return tuple(means)


def thin(points: Sequence[Point], limit: int = MARKS) -> list[Point]:
    """At most `limit` points that keep the lowest, the highest and any non-finite value of every stretch of steps."""
    if len(points) <= limit:
        return list(points)
    kept = []
    buckets = limit // 2
    for b in range(buckets):
        stretch = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        bad = [p for p in stretch if p[1] is None][:1]
        good = sorted((p for p in stretch if p[1] is not None), key=lambda p: p[1] or 0.0)
        kept += sorted({*bad, *good[:1], *good[-1:]}, key=lambda p: p[0])
    return kept


class _Frame:
    """The axes: from (step, value) to pixels."""

    def __init__(self, x: tuple[float, float], y: list[float]) -> None:
        self.x, self.y = x, y

    def px(self, step: float) -> float:
        low, high = self.x
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - low) / (high - low) if high > low else 0.5)

    def py(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y[0]) / (self.y[-1] - self.y[0])

    def draw(self, x_name: str, percent: bool) -> list[str]:
        out = []
        for tick in self.y:
            y = self.py(tick)
            label = f"{tick * 100:.0f} %" if percent else number(float(f"{tick:.10g}"))
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
        low, high = self.x
        marks = [t for t in ticks(low, high, 5) if low <= t <= high and t == int(t)] if high > low else [low]
        for tick in marks:
            out.append(
                f'<text class="tick" x="{self.px(tick):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">'
                f"{number(tick)}</text>"
            )
        base = HEIGHT - BOTTOM
        out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        middle = (LEFT + WIDTH - RIGHT) / 2
        out.append(f'<text class="tick" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_name)}</text>')
        return out


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    caption: str = "",
    ceiling: float | None = None,
    percent: bool = False,
    zero: str = "",
    x_name: str = "step",
) -> str:
    """A card with one line per series over steps; `unit` names the vertical axis.

    The axis reaches 0, and `ceiling` where given. `zero` is the label drawn on the line where every value is
    0: there a flat line is the result. A value that was not finite is a red cross at the top, never a gap in silence.
    """
    series = [s for s in series if s.points]
    if not series:
        return _card(title, unit, _empty(), [], caption)
    finite = [v for s in series for _, v in s.points if v is not None]
    flat = bool(zero) and not any(finite) and all(v is not None for s in series for _, v in s.points)
    low, high = min([0.0, *finite]), max([0.0, *finite, *([] if ceiling is None else [ceiling])])
    high = high if high > low else 1.0
    steps = sorted({x for s in series for x, _ in s.points})
    frame = _Frame((steps[0], steps[-1]), [0.0, 1.0] if flat else ticks(low, high))
    out = frame.draw(x_name, percent)
    broken = False
    for s in series:
        points = thin(s.points)
        style = f"stroke:var(--c{s.color})" + (";stroke-dasharray:5 4" if s.dashed else "")
        kind = "line faint" if s.faint else "line zero" if flat else "line" if len(points) < 150 else "line dense"
        dots = s.dots and len(points) <= DOTS
        for run in _runs(points):
            path = " ".join(f"{frame.px(x):.1f},{frame.py(v):.1f}" for x, v in run)
            if len(run) > 1:
                out.append(f'<polyline class="{kind}" style="{style}" points="{path}"/>')
            if len(run) == 1 or dots:
                out += [_dot(frame.px(x), frame.py(v), s.color) for x, v in run]
        if s.dots:
            for i, (x, v) in enumerate(points):
                if v is not None and i in (0, len(points) - 1):
                    rising = i == 0 and len(points) > 1 and (points[1][1] or v) >= v
                    out.append(_value_label(frame, x, v, f"{v * 100:.1f} %" if percent else number(v), rising))
        for x, v in points:
            if v is None:
                broken = True
                px = frame.px(x)
                out.append(f'<path class="bad" d="M{px - 4:.1f} {TOP - 4}l8 8m-8 0l8 -8"/>')
    if flat:
        out.append(f'<text class="result" x="{LEFT + 8}" y="{frame.py(0) - 9:.1f}">{escape(zero)}</text>')
    out += _hover(frame, series, steps, percent, x_name)
    legend = series if len(series) > 1 and not flat else []
    return _card(title, unit, _svg(title, out), legend, caption, "not finite" if broken else "")


def stacked_chart(title: str, unit: str, series: Sequence[Series], *, caption: str = "", columns: int = 60) -> str:
    """A card with stacked columns: the layers of each step on top of each other; many steps share a column (mean)."""
    series = [s for s in series if s.points]
    if not series:
        return _card(title, unit, _empty(), [], caption)
    by_step = [{x: v or 0.0 for x, v in s.points} for s in series]
    steps = sorted({x for layer in by_step for x in layer})
    share = math.ceil(len(steps) / columns)
    bins = [steps[i : i + share] for i in range(0, len(steps), share)]
    stacks = [[sum(layer.get(x, 0.0) for x in b) / len(b) for layer in by_step] for b in bins]
    high = max(map(sum, stacks)) or 1.0
    frame = _Frame((steps[0] - 0.5, steps[-1] + 0.5), ticks(0.0, high))
    out = frame.draw("step", False)
    for b, stack in zip(bins, stacks, strict=True):
        x, pitch, total = frame.px(b[0] - 0.5), frame.px(b[-1] + 0.5) - frame.px(b[0] - 0.5), 0.0
        span = f"step {number(b[0])}" + (f" to {number(b[-1])}, mean" if len(b) > 1 else "")
        lines = [span, *(f"{s.name}: {number(v)} {unit}" for s, v in zip(series, stack, strict=True))]
        out.append(f'<g class="column"><title>{escape(chr(10).join(lines))}</title>')
        for s, value in zip(series, stack, strict=True):
            top, bottom = frame.py(total + value), frame.py(total)
            out.append(
                f'<rect x="{x + pitch * 0.08:.2f}" y="{top:.2f}" width="{pitch * 0.84:.2f}" '
                f'height="{bottom - top:.2f}" style="fill:var(--c{s.color})"/>'
            )
            total += value
        out.append(
            f'<rect class="hit" x="{x:.2f}" y="{TOP}" width="{pitch:.2f}" height="{HEIGHT - TOP - BOTTOM}"/></g>'
        )
    return _card(title, unit, _svg(title, out), series, caption)


def _runs(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """Stretches of finite points: the line breaks at a value that was not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, v in points:
        if v is None:
            runs.append([])
        else:
            runs[-1].append((x, v))
    return [run for run in runs if run]


def _dot(x: float, y: float, color: int) -> str:
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:var(--c{color})"/>'


def _value_label(frame: _Frame, step: float, value: float, text: str, below: bool) -> str:
    """The value beside its dot: on the side where the line is not."""
    x, y = frame.px(step), frame.py(value)
    anchor = "start" if x < LEFT + 40 else "end" if x > WIDTH - RIGHT - 40 else "middle"
    below = y + 18 < HEIGHT - BOTTOM and (below or y < TOP + 16)
    return f'<text class="value" x="{x:.1f}" y="{y + 18 if below else y - 9:.1f}" text-anchor="{anchor}">{text}</text>'


def _hover(frame: _Frame, series: Sequence[Series], steps: list[float], percent: bool, x_name: str) -> list[str]:
    """An invisible column per step (thinned by stride) with a title that lists every series there."""
    values = [dict(s.points) for s in series]
    shown = steps[:: max(1, math.ceil(len(steps) / MARKS))]
    out = []
    for i, step in enumerate(shown):
        left = frame.px((shown[i - 1] + step) / 2) if i else LEFT
        right = frame.px((step + shown[i + 1]) / 2) if i + 1 < len(shown) else WIDTH - RIGHT
        lines = [f"{x_name} {number(step)}"]
        for s, at in zip(series, values, strict=True):
            if step in at:
                v = at[step]
                lines.append(f"{s.name}: {f'{v * 100:.1f} %' if percent and v is not None else number(v)}")
        x = frame.px(step)
        out.append(
            f'<g class="column"><title>{escape(chr(10).join(lines))}</title><rect class="hit" x="{left:.1f}" y="{TOP}" '
            f'width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            f'<line class="cursor" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></g>'
        )
    return out


def _svg(title: str, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _empty() -> str:
    return '<p class="nothing">not in metrics.jsonl</p>'


def _card(title: str, unit: str, body: str, legend: Sequence[Series], caption: str, bad: str = "") -> str:
    keys = "".join(
        f'<span><i style="background:var(--c{s.color});opacity:{0.45 if s.faint else 1}"></i>{escape(s.name)}</span>'
        for s in legend
    )
    keys += f'<span class="critical">✕ {escape(bad)}</span>' if bad else ""
    return (
        f'<figure class="card"><figcaption><b>{escape(title)}</b> <small>{escape(unit)}</small></figcaption>'
        f'<div class="legend">{keys}</div>{body}<output class="readout"></output>'
        f"{f'<p class=note>{escape(caption)}</p>' if caption else ''}</figure>"
    )
