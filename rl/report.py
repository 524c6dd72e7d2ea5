"""report.html: one self-contained page about a run, from metrics.jsonl, completions.jsonl and summary.json.

python -m rl.report OUT_DIR        writes it again from the files in the folder
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rl.charts import Series, line_chart, number, running_mean, stacked_chart
from rl.log import strict, write_atomic
from rl.metrics import FORMULAS
from rl.page import labelled, page
from rl.token_view import worst_sample

Row = Mapping[str, Any]
PHASES = ("sample", "score", "train", "publish")


class ReportError(ValueError):
    """A folder that holds no run, or a file in it that is not what it should be; one line."""


def write_report(
    path: Path,
    metrics_rows: Iterable[Row],
    summary: Row,
    config: Mapping[str, Any],
    completions: Iterable[Row],
) -> None:
    """Write the page to `path`, whole or not at all. An empty `summary` is a run that has not finished."""
    rows, completions = merged(metrics_rows), list(completions)
    name = str(config.get("name") or summary.get("name") or Path(path).resolve().parent.name)
    body = [
        f'<header><h1>{escape(name)}</h1><p class="soft">samebit: the sampler and the trainer, compared to the last bit</p>',
        "</header>",
        _verdict(rows, summary),
        _tiles(rows, summary),
        "<h2>Curves</h2>",
        _curves(rows, summary),
        "<h2>Divergence between trainer and sampler</h2>",
        _divergence_table(rows),
        "<h2>The worst sample, token by token</h2>",
        worst_sample(completions),
        "<h2>Completions</h2>",
        _completions(completions),
        f"<h2>Configuration</h2><details><summary>Resolved config</summary><pre>{_config_text(config)}</pre></details>",
    ]
    write_atomic(Path(path), page(f"{name} · samebit", "\n".join(body)))


def merged(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One row per (phase, step), in order; a step that was written again (a resumed run) is updated by the later row."""
    by_step: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault((_phase(row), row["step"]), {}).update(strict(row))
    return sorted(by_step.values(), key=lambda row: (_phase(row) != "warmup", row["step"]))


def _phase(row: Row) -> str:
    return str(row.get("phase") or "grpo")


# the head ------------------------------------------------------------------------------------------------------------


def _compared(rows: Sequence[Row], summary: Row) -> tuple[int | None, int | None]:
    """(tokens compared, tokens with different bits) over the run: the summary's, else the sum over steps."""

    def total(key: str) -> int | None:
        if summary.get(f"tokens_{key}") is not None:
            return int(summary[f"tokens_{key}"])
        values = [row[f"divergence/tokens_{key}"] for row in rows if row.get(f"divergence/tokens_{key}") is not None]
        return int(sum(values)) if values else None

    return total("compared"), total("nonzero")


def _numerics(rows: Sequence[Row], summary: Row) -> str:
    """A contrast run says in its summary, and in every row, that it is one."""
    return str(next((row["numerics"] for row in (summary, *rows) if row.get("numerics")), "exact"))


def _verdict(rows: Sequence[Row], summary: Row) -> str:
    compared, nonzero = _compared(rows, summary)
    open_run = "" if summary else "<span>This run has not finished: there is no summary.json.</span>"
    if not compared or nonzero is None:
        return f'<div class="verdict none">No token was compared yet.{open_run}</div>'
    if (numerics := _numerics(rows, summary)) != "exact":
        text = f"Contrast run (numerics={escape(numerics)}): {nonzero:,} of {compared:,} response tokens differ."
        why = "The vendor's matmul in sampler and trainer, its attention in the trainer: a run without exactness."
        return f'<div class="verdict none">{text}<span>{why}</span>{open_run}</div>'
    if nonzero == 0 and not summary:
        return f'<div class="verdict none">{compared:,} response tokens compared so far, 0 differ.{open_run}</div>'
    if nonzero == 0:
        text = f"✓ Exact: {compared:,} response tokens compared, 0 differ."
        why = "Every log-probability that the sampler drew with has the same bits as the trainer's: the ratio is 1."
        return f'<div class="verdict good">{text}<span>{why}</span></div>'
    text = f"✕ Not exact: {nonzero:,} of {compared:,} response tokens differ."
    where = "The table and the worst sampled completion below show how far."
    return f'<div class="verdict bad">{text}<span>{where}</span>{open_run}</div>'


def _tiles(rows: Sequence[Row], summary: Row) -> str:
    compared, nonzero = _compared(rows, summary)
    percent = [
        "?" if (v := summary.get(f"eval_accuracy_{k}")) is None else f"{v * 100:.1f} %" for k in ("before", "after")
    ]
    steps = sum("reward/mean" in row for row in rows)
    tiles = [
        ("Accuracy, before → after", " → ".join(percent)),
        ("Response tokens compared", "?" if compared is None else f"{compared:,}"),
        ("of which differ in any bit", "?" if nonzero is None else f"{nonzero:,}"),
        ("GRPO steps", f"{steps:,}"),
        ("Wall clock", _duration(summary.get("seconds"))),
    ]
    out = [f'<div class="tile"><small>{escape(k)}</small><b>{escape(v)}</b></div>' for k, v in tiles]
    digest = str(summary.get("weights_sha256") or "not known before the run ends")
    label = "" if (numerics := _numerics(rows, summary)) == "exact" else f" (numerics={escape(numerics)})"
    out.append(
        f'<div class="tile wide"><small>SHA-256 of the trained weights{label}</small><b class="mono">{escape(digest)}</b></div>'
    )
    versions = summary.get("versions") or {}
    listed = " · ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, Mapping) else str(versions)
    note = f'<p class="note">{escape(listed)}</p>' if listed else ""
    return f'<div class="tiles">{"".join(out)}</div>{note}'


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


# the curves ----------------------------------------------------------------------------------------------------------


def _points(rows: Sequence[Row], key: str) -> tuple[tuple[float, float | None], ...]:
    return tuple((row["step"], row[key]) for row in rows if key in row)


def _curves(rows: Sequence[Row], summary: Row) -> str:
    warmup = [row for row in rows if _phase(row) == "warmup"]
    rows = [row for row in rows if _phase(row) != "warmup"]
    reward = _points(rows, "reward/mean")
    window = max(2, len(reward) // 20)
    many = len(reward) >= 20
    compared, _ = _compared(rows, {})
    zero = "0 at every step" + (f": {compared:,} tokens, all equal" if compared else "")
    gap = [Series(k, _points(rows, f"divergence/logprob_abs_diff_{k}"), c) for k, c in (("max", 0), ("mean", 2))]
    charts = [
        line_chart(
            "Reward",
            "mean over the batch",
            [
                Series("each step", reward, faint=many),
                *([Series(f"mean of {window} steps", running_mean(reward, window))] if many else []),
            ],
            ceiling=1.0 if all(v is None or v <= 1 for _, v in reward) else None,
        ),
        line_chart(
            "Held-out accuracy",
            "share of answers that are right" + (f", by {by}" if (by := summary.get("judged_by")) else ""),
            [Series("accuracy", _accuracy(rows, summary), 1, dots=True)],
            ceiling=1.0,
            percent=True,
        ),
        line_chart(
            "Tokens that differ",
            "response tokens per step",
            [Series("tokens", _points(rows, "divergence/tokens_nonzero"))],
            zero=zero,
            caption="Compared byte by byte, with no tolerance.",
        ),
        line_chart(
            "Gap of log-probabilities",
            "nats, |trainer − sampler|",
            gap,
            zero="0 at every step, mean and max",
            caption="Systems without exactness: 0.01 to 0.04 on average, of order 1 at most.",
        ),
        stacked_chart(
            "Time per step",
            "s",
            [Series(phase, _points(rows, f"time/{phase}"), i) for i, phase in enumerate(PHASES)],
        ),
        line_chart("Response length", "tokens, mean", [Series("length", _points(rows, "response/length_mean"))]),
        line_chart("Entropy of the policy", "nats per token", [Series("entropy", _points(rows, "policy/entropy"))]),
        line_chart("Gradient norm", "before clipping", [Series("norm", _points(rows, "policy/grad_norm"))]),
    ]
    if warmup:
        loss = next(
            (k for k in ("warmup/loss", "policy/loss", "loss") if any(k in row for row in warmup)), "warmup/loss"
        )
        charts.append(line_chart("Warm start", "loss, nats per token", [Series("loss", _points(warmup, loss), 2)]))
    return f'<div class="grid">{"".join(charts)}</div>'


def _accuracy(rows: Sequence[Row], summary: Row) -> tuple[tuple[float, float | None], ...]:
    """`eval/accuracy` by step, with the summary's before (step 0 of GRPO) and after (its end) where a row has none."""
    points = dict(_points(rows, "eval/accuracy"))
    steps = [row["step"] for row in rows] or [0]
    before, after = summary.get("eval_accuracy_before"), summary.get("eval_accuracy_after")
    if before is not None:
        points.setdefault(min(steps), before)
    last = max(points, default=-1)
    trained = any("reward/mean" in row for row in rows)
    if after is not None and trained and (last < max(steps) or points[last] != after or len(points) == 1):
        points[max(steps) + 1] = after
    return tuple(sorted(points.items()))


# divergence ----------------------------------------------------------------------------------------------------------


def _divergence_table(rows: Sequence[Row]) -> str:
    lines = []
    for name, (formula, ideal) in FORMULAS.items():
        values = [row[name] for row in rows if name in row]
        if not values:
            last = worst = "–"
            state = '<span class="soft">not logged</span>'
        else:
            off = max(values, key=lambda v: math.inf if v is None else abs(v - ideal))
            last, worst = _beside(values[-1], ideal), _beside(off, ideal)
            state = '<span class="ok">✓ ideal</span>' if off == ideal else '<span class="critical">✕ off</span>'
        lines.append(
            f'<tr><td><code>{escape(name)}</code></td><td>{escape(formula)}</td><td class="n">{number(ideal)}</td>'
            f'<td class="n">{last}</td><td class="n">{worst}</td><td>{state}</td></tr>'
        )
    return (
        '<div class="card"><div class="scroll"><table><thead><tr><th>Metric</th><th>Formula</th><th class="n">Ideal</th>'
        '<th class="n">Last step</th><th class="n">Worst step</th><th>All steps</th></tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table></div><p class="note">Over the R response tokens of a step: t and r are '
        "the log-probabilities of trainer and sampler in nats, d = t − r. Bits are compared as they are, the rest is "
        "computed in float64.</p></div>"
    )


def _beside(value: float | None, ideal: float) -> str:
    """The value, written as ideal ± rest where rounding would make it look ideal."""
    if value is None or value == ideal or number(value) != number(ideal):
        return number(value)
    return f"{number(ideal)} {'+' if value > ideal else '−'} {number(abs(value - ideal))}"


# completions and config ----------------------------------------------------------------------------------------------


def _completions(completions: Sequence[Row], each: int = 4) -> str:
    """A few of the first logged step and a few of the last."""
    if not completions:
        return '<div class="card"><p class="nothing">completions.jsonl holds none.</p></div>'
    steps = sorted({row.get("step", 0) for row in completions})
    shown = [row for step in dict.fromkeys((steps[0], steps[-1])) for row in _at(completions, step)[:each]]
    cards = []
    for row in shown:
        reward = row.get("reward")
        high = " high" if isinstance(reward, int | float) and reward > 0 else ""
        cards.append(
            f'<div class="card"><span class="reward{high}">reward {escape(number(reward))}</span>'
            f'<span class="label">step {escape(str(row.get("step", "?")))}</span>{labelled("prompt", row.get("prompt"))}'
            f"{labelled('completion', row.get('completion'))}{labelled('answer', row.get('answer'))}</div>"
        )
    return f'<div class="grid">{"".join(cards)}</div>'


def _at(completions: Sequence[Row], step: float) -> list[Row]:
    return [row for row in completions if row.get("step", 0) == step]


def _config_text(config: Mapping[str, Any]) -> str:
    return escape(json.dumps(strict(config), indent=2, ensure_ascii=False)) if config else "not in the folder"


# the command ---------------------------------------------------------------------------------------------------------


def read_lines(path: Path, end: int | None = None) -> list[dict[str, Any]]:
    """The objects of a jsonl file, or of its first `end` bytes. Half a line at the very end (a run that is writing, or was
    killed) is left out."""
    rows = []
    text = path.read_bytes()[:end].decode("utf-8", errors="replace")
    for i, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.strip() or not line.endswith("\n"):
            continue
        rows.append(_object(line, f"{path}:{i}"))
        if "step" not in rows[-1]:
            raise ReportError(f'{path}:{i}: no "step" in this row')
        if isinstance(rows[-1]["step"], bool) or not isinstance(rows[-1]["step"], int | float):
            raise ReportError(f'{path}:{i}: "step" must be a number')
    return rows


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReportError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ReportError(f"{where}: must be a JSON object")
    return value


def rebuild(out_dir: Path) -> Path:
    """Write out_dir/report.html from the files in `out_dir`; only metrics.jsonl must be there."""
    metrics, completions, summary = (out_dir / n for n in ("metrics.jsonl", "completions.jsonl", "summary.json"))
    if not metrics.is_file():
        raise ReportError(f"{out_dir}: no metrics.jsonl in this folder; name the out_dir of a run")
    config: Any = {}
    if (out_dir / "config.yaml").is_file():
        import yaml  # comes with hydra

        try:
            config = yaml.safe_load((out_dir / "config.yaml").read_text(encoding="utf-8"))
        except yaml.YAMLError:
            raise ReportError(f"{out_dir / 'config.yaml'}: not YAML") from None
    report = out_dir / "report.html"
    write_report(
        report,
        read_lines(metrics),
        _object(summary.read_text(encoding="utf-8"), str(summary)) if summary.is_file() else {},
        config if isinstance(config, dict) else {},
        read_lines(completions) if completions.is_file() else [],
    )
    return report


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: python -m rl.report OUT_DIR", file=sys.stderr)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    try:
        print(rebuild(Path(arguments[0])))
    except (ReportError, OSError) as error:
        print(f"rl.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
