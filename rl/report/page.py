"""Decides what the page says of one run, or of two beside each other, and puts it into page.html."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jinja2

from rl.metrics import FORMULAS
from rl.report.chart import BOX, number
from rl.report.curves import charts
from rl.report.folder import MACHINE, ReportError, Row, Run, flat, read_run
from rl.report.sample import token_view
from rl.report.timeline import HEIGHT, timelines
from rl.run.files import write_atomic

SHOWN = 4  # completions of the first logged step, and of the last


def write_report(out_dir: Path, other: Path | None = None) -> Path:
    """Writes the page of the run in `out_dir`, with the one in `other` beside it, whole or not at all; returns its path.
    Raises ReportError, or OSError."""
    runs = [read_run(Path(folder)) for folder in (out_dir, other) if folder]
    if other and runs[0].name == runs[1].name:
        raise ReportError(f"{out_dir} and {other}: both are called {runs[0].name}; rename a folder, to tell them apart")
    name = f"report-against-{Path(other).resolve().name}.html" if other else "report.html"
    path = Path(out_dir) / name
    write_atomic(path, render(runs))
    return path


@contextlib.contextmanager
def reported(out_dir: Path) -> Iterator[None]:
    """Writes the page at the end of a run, however it ends; where it failed, a page that cannot be written hides nothing."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ReportError, OSError):
            write_report(out_dir)
        raise
    write_report(out_dir)


def render(runs: Sequence[Run]) -> str:
    """Renders the complete HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= BOX | {"strip": HEIGHT}
    environment.filters |= {"number": number}
    return environment.get_template("page.html").render(
        runs=runs,
        title=" against ".join(run.name for run in runs),
        verdicts=[verdict(run) for run in runs],
        facts=[facts(run) for run in runs],
        compared=_first_difference(*runs) if len(runs) == 2 else "",
        charts=charts(runs),
        timelines=timelines(runs),
        formulas=[
            (name, formula, ideal, [_against(run, name, ideal) for run in runs])
            for name, (formula, ideal) in FORMULAS.items()
        ],
        samples=[(run, token_view(run)) for run in runs],
        shown=[(run, row) for run in runs for row in _completions(run)],
        settings=_settings(*runs) if len(runs) == 2 else [],
    )


# the head -------------------------------------------------------------------------------------------------------------


def verdict(run: Run) -> tuple[str, str, str]:
    """Tells whether sampler and trainer agreed (good, bad, none), what to say, and why. A contrast run says in its summary and
    every row that it is one."""
    compared, nonzero = run.tokens("compared"), run.tokens("nonzero")
    differ = f"{nonzero:,} of {compared:,} response tokens differ."
    if not compared:
        return "none", "No token was compared yet.", ""
    if run.numerics != "exact":
        why = "The vendor's matmul in sampler and trainer, its attention in the trainer: a run without exactness."
        return "none", f"Contrast run (numerics={run.numerics}): {differ}", why
    if nonzero:
        return "bad", f"✕ Not exact: {differ}", "The curves and the worst completion below show how far."
    if not run.summary:
        return "none", f"{compared:,} response tokens compared so far, 0 differ.", ""
    why = "Every log-probability that the sampler drew with has the same bits as the trainer's: the ratio is 1."
    return "good", f"✓ Exact: {compared:,} response tokens compared, 0 differ.", why


def facts(run: Run) -> dict[str, str]:
    """Collects what stands in the tiles, by name."""
    said = run.summary.get
    percent = [
        "?" if v is None else f"{v * 100:.1f} %" for v in map(said, ("eval_accuracy_before", "eval_accuracy_after"))
    ]
    label = "" if run.numerics == "exact" else f" (numerics={run.numerics})"
    return {
        "Accuracy, before → after" + (f", by {by}" if (by := said("judged_by")) else ""): " → ".join(percent),
        "Response tokens compared": f"{run.tokens('compared'):,}",
        "of which differ in any bit": f"{run.tokens('nonzero'):,}",
        "GRPO steps": f"{sum('reward/mean' in row for row in run.rows):,}",
        "Wall clock": "?" if (seconds := said("seconds")) is None else str(timedelta(seconds=round(seconds))),
        f"SHA-256 of the trained weights{label}": str(said("weights_sha256") or "not known before the run ends"),
        "Versions": " · ".join(f"{k} {v}" for k, v in said("versions", {}).items()) or "?",
    }


# two runs -------------------------------------------------------------------------------------------------------------


def _first_difference(a: Run, b: Run) -> str:
    """Where the figures of two runs part, those that depend on the machine left out."""
    ours, theirs = ({row["x"]: row for row in run.rows if "reward/mean" in row} for run in (a, b))
    steps = sorted(ours.keys() & theirs.keys())
    for x in steps:
        for key in (k for k in ours[x] if k in theirs[x] and k != "step" and not k.startswith(MACHINE)):
            if ours[x][key] != theirs[x][key]:
                values = "" if isinstance(ours[x][key], dict) else f": {ours[x][key]} and {theirs[x][key]}"
                return f"The runs part at step {number(x)}, first in {key}{values}."
    both = f"All figures of the {len(steps):,} steps that both have are equal."
    return both if steps else "The runs have no step in common."


def _settings(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """Every key of which the runs hold another value."""
    ours, theirs = dict(flat(a.config)), dict(flat(b.config))
    return [(k, ours.get(k, "–"), theirs.get(k, "–")) for k in ours | theirs if ours.get(k, "–") != theirs.get(k, "–")]


# tables ---------------------------------------------------------------------------------------------------------------


def _against(run: Run, name: str, ideal: float) -> tuple[str, str, bool] | None:
    """The last value of a metric, the one that is furthest from its ideal, and whether that is ideal; None where none was
    logged."""
    values = [row[name] for row in run.rows if name in row]
    if not values:
        return None
    off = max(values, key=lambda v: math.inf if v is None else abs(v - ideal))
    return _beside(values[-1], ideal), _beside(off, ideal), off == ideal


def _beside(value: float | None, ideal: float) -> str:
    """The value, written as ideal ± rest where rounding would make it look ideal."""
    if value is None or value == ideal or number(value) != number(ideal):
        return number(value)
    return f"{number(ideal)} {'+' if value > ideal else '−'} {number(abs(value - ideal))}"


def _completions(run: Run) -> list[Row]:
    steps = dict.fromkeys(row["step"] for row in run.completions)
    return [row for step in steps for row in [r for r in run.completions if r["step"] == step][:SHOWN]]
