"""Says how runs stand, by what their folders hold."""

import fcntl
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.box import SIMPLE
from rich.table import Table

from rl.out_dir import LOCK
from rl.report.folder import ReportError, lines
from rl.run.files import read_mapping

if TYPE_CHECKING:  # `python -m rl.runs` needs no config, and no torch
    from rl.config import RunConfig

_STOPPED = re.compile(r"stopped(?: by|:) (.*)")  # how train.log ends where a run does not


@dataclass(frozen=True)
class Standing:
    """Says how far a run is and what is known of it; None: not known."""

    folder: Path
    state: str  # running, finished, or stopped, with the reason where the log has it
    step: int  # GRPO steps that are done
    steps: int | None  # of how many
    before: float | None  # accuracy on held-out problems
    after: float | None  # the last one that is known
    compared: int  # log-probs of both sides
    differing: int
    weights: str  # SHA-256, of a finished run
    seconds: float | None
    changed: datetime  # when its logs last grew

    def row(self) -> dict[str, Any]:
        """Returns the values as JSON has them."""
        return vars(self) | {"folder": str(self.folder), "changed": self.changed.isoformat(timespec="seconds")}


def standing(folder: Path) -> Standing:
    """Reads how the run in `folder` stands. What cannot be read is not known."""
    summary, config = read_mapping(folder / "summary.json"), read_mapping(folder / "config.yaml", yaml.safe_load)
    rows = [row for row in _rows(folder) if row.get("phase") == "grpo"]
    accuracies = [row["eval/accuracy"] for row in rows if row.get("eval/accuracy") is not None]
    accuracies = [summary.get("eval_accuracy_before"), summary.get("eval_accuracy_after")] if summary else accuracies
    logs = [p for name in ("metrics.jsonl", "train.log", "config.yaml") if (p := folder / name).exists()]
    return Standing(
        folder=folder,
        state=_state(folder, bool(summary)),
        step=max((int(row["grpo/step"]) for row in rows if row.get("grpo/step") is not None), default=0),
        steps=config.get("steps"),
        before=accuracies[0] if accuracies else None,
        after=accuracies[-1] if accuracies else None,
        compared=int(sum(row.get("divergence/tokens_compared") or 0 for row in rows)),
        differing=int(sum(row.get("divergence/tokens_nonzero") or 0 for row in rows)),
        weights=str(summary.get("weights_sha256") or ""),
        seconds=summary.get("seconds"),
        changed=datetime.fromtimestamp(max((p.stat().st_mtime for p in logs), default=0)),
    )


def runs_under(folder: Path) -> Iterator[Path]:
    """Finds the folders of runs in `folder`, itself included; those of a sweep stand in one."""
    for path, folders, files in os.walk(folder):
        if "config.yaml" in files:
            folders[:] = []  # its checkpoints and its model are no runs
            yield Path(path)


def table(standings: Iterable[Standing], title: str = "") -> Table:
    """Draws a table with one row a run."""
    out = Table(title=title or None, title_justify="left", box=SIMPLE)
    for name in ("run", "state", "step", "accuracy", "differ", "weights (SHA-256)", "changed"):
        out.add_column(name, justify="right" if name in ("step", "differ") else "left", overflow="fold")
    for run in standings:
        accuracy = " -> ".join("?" if v is None else f"{v:.3f}" for v in (run.before, run.after))
        out.add_row(
            str(run.folder),
            run.state,
            f"{run.step}/{'?' if run.steps is None else run.steps}",
            "" if run.before is None else accuracy,
            f"{run.differing:,} of {run.compared:,}" if run.compared else "",
            run.weights[:16],
            f"{run.changed:%Y-%m-%d %H:%M}",
        )
    return out


def sweep_table(configs: "Sequence[RunConfig]") -> Table:
    """Makes a table with one row a run, those included that an earlier command finished; a run without a summary is said to
    be unfinished."""
    out = Table(title=f"Sweep of {len(configs)} runs", title_justify="left", box=SIMPLE)
    for name in ("run", "overrides", "accuracy", "weights (SHA-256)", "s"):
        right = name in ("run", "s")
        out.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)  # never cut
    for i, config in enumerate(configs, 1):
        found = read_mapping(Path(config.out_dir) / "summary.json")
        accuracy = [found.get(f"eval_accuracy_{when}") for when in ("before", "after")]
        cells = (
            " -> ".join("?" if v is None else f"{v:.3f}" for v in accuracy) if found else "not finished",
            str(found.get("weights_sha256", ""))[:16],
            f"{found['seconds']:.0f}" if "seconds" in found else "",
        )
        out.add_row(str(i), Path(config.out_dir).name, *cells)
    return out


def _state(folder: Path, has_summary: bool) -> str:
    if _is_busy(folder):
        return "running"
    if has_summary:
        return "finished"
    try:
        last = (folder / "train.log").read_text("utf-8", "replace").splitlines()[-1:]
    except OSError:
        last = []
    found = _STOPPED.search(last[0]) if last else None
    return f"stopped: {found[1]}" if found else "stopped"


def _is_busy(folder: Path) -> bool:
    """Tells whether a process has claimed the folder (rl/out_dir.py); looks, and takes nothing from who would."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        return list(lines(folder / "metrics.jsonl"))
    except (ReportError, OSError):
        return []
