"""Reads what the runs left, and draws it: the curves of each arm, their mean over the seeds in front."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rl.report.chart import BOX, Chart, Point, Series, number, running_mean
from rl.report.folder import lines
from rl.run.files import read_mapping, write_atomic

ARMS = ("exact", "fast")
COLORS = {"exact": "#1a7f5a", "fast": "#c2452d"}
NAMES = {"exact": "numerics=exact", "fast": "numerics=fast"}
CURVES = {  # by metric: title, unit, whether the axis is logarithmic
    "divergence/logprob_abs_diff_max": ("Largest gap of sampler and trainer", "|d| of a step, nats", True),
    "divergence/logprob_abs_diff_mean": ("Mean gap of sampler and trainer", "|d|, nats", True),
    "reward/mean": ("Reward", "mean of the batch", False),
    "policy/entropy": ("Entropy of the policy", "nats a token", False),
    "policy/grad_norm": ("Gradient norm", "before clipping", False),
    "off_policy/kl_k3": ("KL of the later updates", "nats", False),
}


@dataclass(frozen=True)
class Run:
    """Names one run."""

    arm: str
    seed: int
    folder: Path

    def steps(self) -> list[dict[str, Any]]:
        """Returns its GRPO steps so far, by step; none where it has not begun."""
        if not (self.folder / "metrics.jsonl").exists():
            return []
        return [row for row in lines(self.folder / "metrics.jsonl") if row.get("grpo/step")]


def write(runs: Sequence[Run], out: Path) -> None:
    """Writes why.json and why.svg of all that is there, finished or not."""
    found = [(run, run.steps()) for run in runs]
    rows = [
        {
            "numerics": run.arm,
            "seed": run.seed,
            "finished": bool(summary := read_mapping(run.folder / "summary.json")),
            "accuracy": [summary.get("eval_accuracy_before"), summary.get("eval_accuracy_after")],
            "tokens_compared": summary.get("tokens_compared"),
            "tokens_nonzero": summary.get("tokens_nonzero"),
            "step": [step["grpo/step"] for step in steps],
            **{name: [step.get(name) for step in steps] for name in CURVES},
        }
        for run, steps in found
    ]
    write_atomic(out / "why.json", json.dumps(rows, indent=1) + "\n")
    write_atomic(out / "why.svg", svg(rows))


def svg(rows: Sequence[dict[str, Any]]) -> str:
    """Draws a chart of each of `CURVES`: thin lines are runs, thick ones the mean over the seeds that have the step."""
    width, height, columns = BOX["width"] + 20, BOX["height"] + 40, 2
    deep = -(-len(CURVES) // columns)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {deep * height + 30}" '
        f'font-family="sans-serif" font-size="11" fill="#333">',
        f'<rect width="{columns * width}" height="{deep * height + 30}" fill="white"/>',
        *(
            f'<text x="{20 + 160 * i}" y="20" fill="{COLORS[arm]}" font-weight="bold">{NAMES[arm]}: {_count(rows, arm)}</text>'
            for i, arm in enumerate(ARMS)
        ),
    ]
    for i, (metric, (title, unit, log)) in enumerate(CURVES.items()):
        x, y = i % columns * width + 10, i // columns * height + 30
        parts += [f'<g transform="translate({x} {y})">', *_chart(rows, metric, title, unit, log), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _count(rows: Sequence[dict[str, Any]], arm: str) -> str:
    there = sum(row["numerics"] == arm and bool(row["step"]) for row in rows)
    return f"{there} run{'' if there == 1 else 's'}"


def _chart(rows: Sequence[dict[str, Any]], metric: str, title: str, unit: str, log: bool) -> Iterator[str]:
    each, means = [], []
    for color, arm in enumerate(ARMS):
        runs = [_points(row, metric) for row in rows if row["numerics"] == arm]
        runs = [points for points in runs if points]
        each += [Series(arm, _smooth(points), color, "thin") for points in runs]
        means += [Series(arm, _smooth(_mean(runs)), color, "thick")] if runs else []
    chart = Chart(title, unit, [*each, *means], log=log)
    yield f'<text x="{BOX["left"]}" y="8" font-weight="bold">{escape(title)}</text>'
    yield f'<text x="{BOX["right"]}" y="8" text-anchor="end" fill="#777">{escape(unit)}</text>'
    if not chart.series:
        yield f'<text x="{BOX["left"]}" y="80" fill="#777">nothing yet</text>'
        return
    for at, text in chart.y_ticks():
        yield f'<path d="M{BOX["left"]} {at}H{BOX["right"]}" stroke="#ddd"/>'
        yield f'<text x="{BOX["left"] - 6}" y="{at + 4}" text-anchor="end">{text}</text>'
    for at, text in chart.x_ticks():
        yield f'<text x="{at}" y="{BOX["bottom"] + 16}" text-anchor="middle">{text}</text>'
    for series in chart.series:
        thick = series.look == "thick"
        look = f'stroke="{COLORS[series.name]}" stroke-width="{2 if thick else 0.7}" opacity="{1 if thick else 0.4}"'
        for piece in chart.stretches(series):
            yield f'<polyline fill="none" {look} points="{" ".join(f"{x},{y}" for x, y in piece)}"/>'
    for at in chart.crosses():
        yield f'<text x="{at}" y="{BOX["top"]}" text-anchor="middle" fill="red">×</text>'
    last = "; ".join(f"{s.name} {number(s.points[-1][1])}" for s in means)
    yield f'<text x="{BOX["left"]}" y="{BOX["bottom"] + 32}" fill="#777">{escape(f"step; last mean: {last}")}</text>'


def _points(row: dict[str, Any], metric: str) -> list[Point]:
    pairs = zip(row["step"], row[metric], strict=True)
    return [(float(step), None if value is None else abs(value)) for step, value in pairs]


def _mean(runs: Sequence[Sequence[Point]]) -> list[Point]:
    """Means over the runs that have a finite value at a step."""
    at: dict[float, list[float]] = {}
    for points in runs:
        for x, value in points:
            if value is not None:
                at.setdefault(x, []).append(value)
    return [(x, math.fsum(values) / len(values)) for x, values in sorted(at.items())]


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Takes the mean of the last few steps; a value that was not finite stays to be seen."""
    bad = [(x, None) for x, value in points if value is None]
    return sorted([*running_mean(points, max(1, len(points) // 25)), *bad], key=lambda point: point[0])
