"""Makes the charts of a page from the rows of one run, or of two: the second is dashed, or has a colour of its own."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rl.metrics import EQUAL, FORMULAS, GAPS, POSITIONS, PROBABILITIES
from rl.report.chart import Chart, Point, Series, number, running_mean
from rl.report.folder import Row, Run


def curves() -> dict[str, list[dict[str, Any]]]:
    """Returns what curves.yaml says of each section: title, unit, metrics, look."""
    table: dict[str, list[dict[str, Any]]] = yaml.safe_load(Path(__file__).with_name("curves.yaml").read_text("utf-8"))
    return table


def charts(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Makes the charts of each section, of what a run has logged: a CPU has no MFU, an earlier version had fewer metrics."""
    table = curves()
    _name_each(table["learning"], runs)
    sections = {name: [_curve(runs, **what) for what in rows] for name, rows in table.items()}
    sections["divergence"] += _gaps(runs)
    return {name: [chart for chart in found if chart.series] for name, found in sections.items()}


_LEAST = {"reward/*": 2}
"""Names that there must be for a curve of each: one reward alone is the sum itself."""


def _name_each(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> None:
    """Puts what the runs have logged where the table has a pattern: a reward's name, or that of an evaluation set."""
    known = {key for row in rows for key in row["metrics"]}
    logged = {key for run in runs for row in run.rows for key in row} - known
    for row in rows:
        for pattern in [key for key in row["metrics"] if "*" in key]:
            start, _, end = pattern.partition("*")
            found = sorted(key for key in logged if key.startswith(start) and key.endswith(end))
            names = {key: key.removeprefix(start).removesuffix(end) for key in found}
            row["metrics"] = names if len(names) >= _LEAST.get(pattern, 1) else {}


def _curve(
    runs: Sequence[Run],
    title: str,
    unit: str,
    metrics: Mapping[str, str],
    of: str = "rows",
    smooth: bool = False,
    ideal: bool = False,
    log: bool = True,
    look: str = "line",
    **more: Any,
) -> Chart:
    """One of curves.yaml, which says what the arguments are."""
    away = {key: FORMULAS[key][1] if ideal else None for key in metrics}
    lines = {name: [_points(getattr(run, of), key, away[key]) for run in runs] for key, name in metrics.items()}
    series = _series(runs, lines, look)
    if smooth and (window := max(len(s.points) for s in series) // 20) > 1:
        # Of two runs, it would hide the means
        faint = [replace(s, look="line faint") for s in series if len(runs) == 1]
        means = {f"mean of {window} steps": [running_mean(s.points, window) for s in series]}
        series, unit = faint + _series(runs, means), unit if faint else f"{unit}, mean of {window} steps"
    return Chart(title, unit, series, log=ideal and log, flat="0 at every step" if ideal else "", **more)


def _points(rows: Sequence[Row], key: str, ideal: float | None) -> list[Point]:
    """The values of a metric, or with `ideal` their distances from it."""
    found = [(row["x"], row[key]) for row in rows if key in row]
    return found if ideal is None else [(x, None if v is None else abs(v - ideal)) for x, v in found]


def _series(runs: Sequence[Run], lines: Mapping[str, Sequence[Sequence[Point]]], look: str = "line") -> list[Series]:
    """`lines`: by name, the points of each run."""
    out, alone = [], len(lines) == 1
    for color, (name, each) in enumerate(lines.items()):
        for i, (run, points) in enumerate(zip(runs, each, strict=True)):
            called = name if len(runs) == 1 else run.name if alone else f"{name}, {run.name}"
            dashed = look if alone or not i else f"{look} dashed"
            out.append(Series(called, points, 2 * i if alone else color, dashed))
    return out


# where gaps lie: of the classes that rl.metrics.profile counts -----------------------------------------------------------


def _gaps(runs: Sequence[Run]) -> Iterator[Chart]:
    found = [_added(run.rows, "divergence/by_gap") for run in runs]
    names = _used([EQUAL, *(f"{edge:g}" for edge in GAPS)], found)
    shares = [
        [(i, c[k][0] / math.fsum(n for n, *_ in c.values())) for i, k in enumerate(names) if k in c] for c in found
    ]
    labels = ["equal" if k == EQUAL else "< 1e-9" if k == "0" else number(float(k)) for k in names]
    series = _series(runs, {"tokens": shares}, "bars")
    yield Chart("Sizes of gaps", "share of tokens", series, "|d| from, nats", labels, log=True, percent=True)
    for what, edges in (("position", POSITIONS), ("probability", PROBABILITIES)):
        found = [_added(run.rows, f"divergence/by_{what}") for run in runs]
        names = _used([f"{edge:g}" for edge in edges], found)
        largest = [[(i, c[k][3]) for i, k in enumerate(names) if k in c] for c in found]
        means = [[(i, c[k][2] / c[k][0]) for i, k in enumerate(names) if k in c] for c in found]
        series = _series(runs, {"max": largest, "mean": means}, "line dots")
        x_name, flat = f"{what} of the token, from", f"0 at every {what}"
        yield Chart(
            f"Gap by {what}", "|d|, nats, all steps", series, x_name, [number(float(k)) for k in names], "", flat, True
        )


def _added(rows: Sequence[Row], key: str) -> dict[str, tuple[float, ...]]:
    """By class: [tokens, tokens that differ, sum of |d|, largest |d|] of all steps; null is what was not finite."""
    out: dict[str, tuple[float, ...]] = {}
    for row in rows:
        for name, values in row.get(key, {}).items():
            new = [
                math.inf if v is None else v for v in (values if isinstance(values, list) else [values, 0, 0.0, 0.0])
            ]
            had = out.get(name, (0, 0, 0.0, 0.0))
            out[name] = (had[0] + new[0], had[1] + new[1], had[2] + new[2], max(had[3], new[3]))
    return out


def _used(classes: Sequence[str], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """From the first class that holds a token to the last."""
    used = [i for i, name in enumerate(classes) if any(name in by for by in found)]
    return list(classes[used[0] : used[-1] + 1]) if used else []
