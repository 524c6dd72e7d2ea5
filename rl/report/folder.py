"""Reads what a run has left in its folder so far: only metrics.jsonl must be there."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rl.metrics import Badness, worst

Row = Mapping[str, Any]
_LARGEST = "divergence/logprob_abs_diff_max"
MACHINE = ("time/", "speed/", "memory/")
"""Metrics that depend on the machine: two equal runs do not share them."""


class ReportError(ValueError):
    """Says in one line that a folder holds no run, or that a file in it is not what it should be."""


@dataclass(frozen=True)
class Run:
    """Holds what a page shows of one run. A step is counted as on the console: `x` of a row, from 1; 0 is before the first."""

    name: str
    warmup: list[Row]
    rows: list[Row]  # of GRPO: one a step, and one of an evaluation before and after
    completions: list[Row]  # sampled ones of the first and of the last step that has some
    worst: Row | None  # the completion with the worst token of the run (rl.metrics.worst)
    summary: Row  # empty where the run has not finished
    config: Row
    config_text: str  # as it is in the file

    @property
    def numerics(self) -> str:
        """Names the arithmetic, as the summary or the rows do: `exact` where they are silent."""
        return str(next((row["numerics"] for row in (self.summary, *self.rows) if row.get("numerics")), "exact"))

    @property
    def largest_gap(self) -> float:
        """Finds the largest |d| of all steps, in nats."""
        found = [row[_LARGEST] for row in self.rows if _LARGEST in row]
        return max((math.inf if v is None else v for v in found), default=0.0)

    def tokens(self, which: str) -> int:
        """Counts response tokens of all steps that were `compared`, or that differ (`nonzero`)."""
        logged = math.fsum(row.get(f"divergence/tokens_{which}") or 0 for row in self.rows)
        return int(self.summary.get(f"tokens_{which}", logged))


def read_run(folder: Path) -> Run:
    """Reads the run in `folder`, as far as it is. Raises ReportError, or OSError."""
    if not (folder / "metrics.jsonl").is_file():
        raise ReportError(f"{folder}: no metrics.jsonl in this folder; name the out_dir of a run")
    config, text = _config(folder / "config.yaml")
    summary = folder / "summary.json"
    warmup, rows, offset = _counted(merged(read_lines(folder / "metrics.jsonl")))
    completions, bad = _chosen(lines(folder / "completions.jsonl"), offset)
    name = str(config.get("name") or folder.resolve().name)
    found = _object(summary.read_text("utf-8"), str(summary)) if summary.is_file() else {}
    return Run(name, warmup, rows, completions, bad, found, config, text)


def lines(path: Path, end: int | None = None) -> Iterator[dict[str, Any]]:
    """Reads the objects of a jsonl file, or of its first `end` bytes, one after the other; none where there is no file. Half a
    line at the very end (a run that is writing, or was killed) is left out."""
    if not path.is_file():
        return
    left = math.inf if end is None else end
    with open(path, "rb") as file:
        for i, line in enumerate(file, 1):
            left -= len(line)
            if left < 0 or not line.endswith(b"\n"):
                return
            if line.strip():
                yield _row(line, f"{path}:{i}")


def read_lines(path: Path, end: int | None = None) -> list[dict[str, Any]]:
    """Reads all `lines` of a file."""
    return list(lines(path, end))


def merged(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Sorts rows, one for each (phase, step); a step that was written again (a resumed run) is updated by the later row."""
    by_step: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault((_phase(row), row["step"]), {}).update(row)
    return sorted(by_step.values(), key=lambda row: (_phase(row) != "warmup", row["step"]))


def flat(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every dotted key of a config with its value; an empty group is a value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def badness(row: Row) -> Badness | None:
    """Says how bad the worst token of a logged completion is; None where it does not hold the log-probs of both sides."""
    ours, theirs = floats(row.get("trainer_logprobs")), floats(row.get("logprobs"))
    return worst(ours, theirs)[0] if len(ours) and len(ours) == len(theirs) else None


def floats(values: Any) -> np.ndarray:
    """Converts logged numbers to float32 [T]; null, which stands for what was not finite, becomes NaN."""
    return np.array([math.nan if v is None else v for v in values or ()], dtype=np.float32)


def _phase(row: Row) -> str:
    return str(row.get("phase") or "grpo")


def _counted(rows: list[dict[str, Any]]) -> tuple[list[Row], list[Row], float]:
    """The rows of the warm start and of GRPO with their `x`, and what a logged step is ahead of it in GRPO."""
    warmup = [row | {"x": row["step"] + 1} for row in rows if _phase(row) == "warmup"]
    rows = [row for row in rows if _phase(row) != "warmup"]
    ahead = [(row["step"] - row["grpo/step"], row["grpo/step"]) for row in rows if "grpo/step" in row]
    # The evaluation after the last step has a row of its own
    offset, last = ahead[-1] if ahead else (len(warmup), math.inf)
    return list(warmup), [row | {"x": min(max(row["step"] - offset, 0), last)} for row in rows], offset


def _chosen(logged: Iterable[Row], offset: float) -> tuple[list[Row], Row | None]:
    """The rows of the first and of the last step, and the worst of all; line by line, since the file may be large."""
    kept: dict[float, list[Row]] = {}
    bad: tuple[Badness, Row] | None = None
    for line in logged:
        row = {**line, "x": line["step"] - offset}
        kept.setdefault(row["x"], []).append(row)
        if len(kept) > 2:
            del kept[list(kept)[1]]
        if (found := badness(row)) is not None and (bad is None or found > bad[0]):
            bad = found, row
    return [row for rows in kept.values() for row in rows], bad and bad[1]


def _config(path: Path) -> tuple[Row, str]:
    try:
        text = path.read_text("utf-8") if path.is_file() else ""
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ReportError(f"{path}: not YAML") from None
    return (values if isinstance(values, dict) else {}), text


def _row(line: bytes, where: str) -> dict[str, Any]:
    row = _object(line.decode("utf-8", errors="replace"), where)
    if "step" not in row:
        raise ReportError(f'{where}: no "step" in this row')
    if isinstance(row["step"], bool) or not isinstance(row["step"], int | float):
        raise ReportError(f'{where}: "step" must be a number')
    return row


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(value, dict):
        raise ReportError(f"{where}: must be a JSON object")
    return value
