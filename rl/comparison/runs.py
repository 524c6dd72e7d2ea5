"""Compares two runs by their configs, checkpoints, metrics and completions; each to its first difference.

Nothing has a tolerance: numbers are compared as JSON wrote them, which names every float64 and every float32 exactly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from rl.errors import UserError
from rl.identity import is_free
from rl.replay import kept
from rl.replay.command import between
from rl.replay.parting import Parting
from rl.replay.sides import Model, trainer_side
from rl.report.folder import MACHINE, ReportError, flat, lines, merged
from trainer.checkpoint import CheckpointError, folders, read

Row = Mapping[str, Any]

_ASIDE = ("divergence/by_gap", "divergence/by_position", "divergence/by_probability")


@dataclass(frozen=True)
class Difference:
    """Says what is first seen to differ, and both values."""

    where: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.where}: {_short(self.a)} | {_short(self.b)}"


@dataclass(frozen=True)
class Comparison:
    """Holds what two runs have in common and where they part; None: nowhere."""

    settings: tuple[Difference, ...]  # of what decides a bit
    layout: tuple[Difference, ...]  # of what decides none
    checkpoint: Difference | None
    equal_checkpoints: int  # of steps that both have
    metrics: Difference | None
    equal_rows: int
    completion: Difference | None
    equal_completions: int
    replayed: tuple[int, Parting] | None = None  # a step whose batch both kept, and where their models part on it

    @property
    def apart(self) -> bool:
        """Tells whether anything that two equal runs share differs."""
        parted = self.replayed is not None and self.replayed[1].stage is not None
        return parted or any((self.settings, self.checkpoint, self.metrics, self.completion))


def compare(a: Path, b: Path) -> Comparison:
    """Compares the runs in two folders. UserError where one holds no run, or a file that cannot be read."""
    try:
        settings, layout = _configs(_config(a), _config(b))
        checkpoint, checkpoints = _checkpoints(a, b)
        metrics, rows = _first(_steps(a), _steps(b), _metrics)
        completion, completions = _first(_completions(a), _completions(b), _tokens)
    except (ReportError, CheckpointError) as error:
        raise UserError(str(error)) from None
    return Comparison(settings, layout, checkpoint, checkpoints, metrics, rows, completion, completions)


def replayed(a: Path, b: Path, console: Console) -> tuple[int, Parting] | None:
    """Computes the forward pass of the trainer with the weights of each run over the batch of the earliest step that both kept;
    returns the step, and where the two part. None where there is no such step. UserError where one kept no weights, or the
    two models are of different shapes."""
    mine, theirs = ({p.name: p for p in kept.folders(run)} for run in (a, b))
    if not (common := sorted(mine.keys() & theirs.keys())):
        return None
    one, other = (kept.read(of[common[0]]) for of in (mine, theirs))
    if one.model() != other.model() or one.dtype != other.dtype:
        raise UserError(f"step {one.step} was kept by both, of models that are not of one shape or dtype")
    model = Model(one.model(), one.dtype, one.device)

    first, second = (partial(trainer_side, model, held.weights, one.batch) for held in (one, other))
    return one.step, between(first, second, one.batch, model.config.layers, console, (str(a), str(b)))


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text())
    except OSError as error:
        raise UserError(f"{folder} holds no run (config.yaml: {error.strerror})") from None
    except (ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.yaml'} is no config")
    return dict(flat(values))


def _configs(a: Row, b: Row) -> tuple[tuple[Difference, ...], tuple[Difference, ...]]:
    found = [Difference(key, a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
    free = tuple(d for d in found if is_free(d.where))
    return tuple(d for d in found if d not in free), tuple(d for d in free if d.where not in ("out_dir", "logger"))


def _checkpoints(a: Path, b: Path) -> tuple[Difference | None, int]:
    mine, theirs = ({p.name: p for p in folders(run / "checkpoints")} for run in (a, b))
    equal = 0
    for name in sorted(mine.keys() & theirs.keys()):
        hashes = [read(p).weights_sha256 for p in (mine[name], theirs[name])]
        if hashes[0] != hashes[1]:
            return Difference(f"weights of {name} (SHA-256)", hashes[0][:16], hashes[1][:16]), equal
        equal += 1
    return None, equal


Keyed = Iterator[tuple[tuple[Any, ...], Row]]


def _first(a: Keyed, b: Keyed, compared: Any) -> tuple[Difference | None, int]:
    """The first of two sequences of rows, in the order of their keys, that differ; and how many are equal before. Where one of
    them ends, the comparison does."""
    equal = 0
    for (key, mine), (other, theirs) in zip(a, b, strict=False):
        if key != other:
            return Difference("which comes next", *(" ".join(map(str, k)) for k in (key, other))), equal
        if found := compared(key, mine, theirs):
            return found, equal
        equal += 1
    return None, equal


def _steps(folder: Path) -> Keyed:
    for row in merged(lines(folder / "metrics.jsonl")):
        yield (row.get("phase") or "grpo", "step", row["step"]), row


def _metrics(key: Sequence[Any], a: Row, b: Row) -> Difference | None:
    """Compares what both rows have: one run may be evaluated more often, or have ended where the other goes on."""
    names = [n for n in a if n in b and not n.startswith(MACHINE) and n not in _ASIDE]
    differing = [n for n in names if a[n] != b[n]]
    if not differing:
        return None
    others = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    return Difference(f"{' '.join(map(str, key))}: {differing[0]}{others}", a.get(differing[0]), b.get(differing[0]))


def _completions(folder: Path) -> Keyed:
    """Rows of completions.jsonl, numbered within their step; what one run kept as its worst sample so far, the other may not
    have."""
    seen: dict[tuple[Any, ...], int] = {}
    for row in lines(folder / "completions.jsonl"):
        key = ("step", row.get("step"))
        seen[key] = seen.get(key, 0) + 1
        yield (*key, "completion", seen[key] - 1), row


def _tokens(key: Sequence[Any], a: Row, b: Row) -> Difference | None:
    where = " ".join(map(str, key))
    for name in ("prompt", "answer"):
        if a.get(name) != b.get(name):
            return Difference(f"{where}: {name}", a.get(name), b.get(name))
    for side, column in (("the sampler", "logprobs"), ("the trainer", "trainer_logprobs")):
        for i, (one, other) in enumerate(zip_longest(_column(a, column), _column(b, column))):
            if one != other:
                tokens = [_at(row.get("tokens"), i) for row in (a, b)]
                return Difference(f"{where}, token {i}: log-prob of {side}", *map(_shown, (one, other), tokens))
    if a.get("tokens") != b.get("tokens"):
        i = next(i for i, (x, y) in enumerate(zip_longest(a.get("tokens", []), b.get("tokens", []))) if x != y)
        return Difference(f"{where}, token {i}", _at(a.get("tokens"), i), _at(b.get("tokens"), i))
    if a.get("reward") != b.get("reward"):
        return Difference(f"{where}: reward", a.get("reward"), b.get("reward"))
    return None


def _column(row: Row, name: str) -> Sequence[Any]:
    values = row.get(name)
    return values if isinstance(values, list) else []


def _at(values: Any, i: int) -> Any:
    return values[i] if isinstance(values, list) and i < len(values) else None


def _shown(logprob: float | None, token: Any) -> str:
    if logprob is None:
        return "none"
    value = np.float32(logprob)
    return f"{value!s} (0x{int(value.view(np.uint32)):08x}) of token {token}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
