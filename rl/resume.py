"""Where a run begins: at nothing, or at a checkpoint that an earlier process of the same run left."""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kernels.model import ModelConfig
from rl.adapters import ADAPTER
from rl.checkpoints import Progress
from rl.config import RunConfig, validate
from rl.errors import FinishedError, UserError
from rl.identity import difference, identity
from rl.keys import renewed
from rl.report import ReportError, read_lines
from trainer.checkpoint import BASE, MANIFEST, Checkpoint, CheckpointError, folders, read, verify

LOGS = ("metrics.jsonl", "completions.jsonl")
REFERENCE = "reference"
LEFT = (
    *LOGS,
    "train.log",
    "summary.json",
    "report.html",
    "model",
    ADAPTER,
    REFERENCE,
    BASE,
)  # what a run writes once its config.yaml is there


@dataclass(frozen=True)
class Start:
    """Says where a run begins and what was found on the way."""

    checkpoint: Checkpoint | None
    continues: bool  # out_dir holds an earlier part of this run, whose logs are cut where this one begins
    refused: tuple[str, ...]  # newer checkpoints that are damaged, and how

    @property
    def progress(self) -> Progress:
        """Returns how far the checkpoint is, or the beginning."""
        return Progress(**self.checkpoint.run["progress"]) if self.checkpoint else Progress()


def find_start(config: RunConfig, mine: Mapping[str, Any], thorough: bool) -> Start:
    """Raises UserError where out_dir holds another run or a finished one, or `resume` names no checkpoint of this one.
    `thorough`: reads every file of the checkpoint it returns, and passes over one that is damaged."""
    out_dir = Path(config.out_dir)
    try:
        used = (out_dir / "config.yaml").exists()
    except OSError as error:
        raise UserError(f"out_dir={out_dir} cannot be read: {error.strerror}") from None
    taken = f"out_dir={out_dir} holds a run already"
    if not used and (held := _left(out_dir)):
        raise UserError(f"out_dir={out_dir} holds {held} and no config.yaml, which says whose it is: choose another")
    if config.resume not in ("auto", "false"):
        return _named(config, mine, thorough, taken if used else "")
    if not used:
        return Start(None, False, ())
    if config.resume == "false":
        raise UserError(f"{taken}: choose another or remove it (resume=false)")
    theirs = _same(out_dir, config, taken)
    done = _finished(out_dir)
    if done is not None and config.steps <= done:
        raise FinishedError(
            f"{taken}, finished after steps={done}: choose another, remove it, or set steps above {done}"
        )
    found = folders(out_dir / "checkpoints")
    if not found and (done is not None or not theirs.checkpoint.every):
        raise UserError(f"{taken}, and no checkpoint: choose another or remove it")
    if not found:  # it was stopped before its first
        return Start(None, True, ())
    return _newest(found, config, mine, thorough, f"out_dir={out_dir}", True)


def _named(config: RunConfig, mine: Mapping[str, Any], thorough: bool, taken: str) -> Start:
    path, out_dir = Path(config.resume), Path(config.out_dir)
    single = (path / MANIFEST).exists()
    found = [path] if single else folders(path / "checkpoints") or folders(path)
    if not found:
        raise UserError(f"resume={path} is neither a checkpoint nor a folder that holds any (auto, false, or a folder)")
    own = folders(out_dir / "checkpoints")
    if taken and not own:  # it may have begun so, and been stopped before a checkpoint of its own
        theirs = _same(out_dir, config, taken)
        if theirs.resume != config.resume or not theirs.checkpoint.every or _finished(out_dir) is not None:
            raise UserError(f"{taken}, and did not begin at resume={path}: choose another out_dir")
    elif taken and found[0].resolve() != own[0].resolve():
        raise UserError(
            f"{taken}, and resume={path} is not its newest checkpoint: choose another out_dir, or resume=auto"
        )
    return _newest(found, config, mine, thorough, f"resume={path}", bool(taken and own))


def _newest(
    found: list[Path], config: RunConfig, mine: Mapping[str, Any], thorough: bool, where: str, continues: bool
) -> Start:
    """The newest of `found` that is what was written."""
    refused: list[str] = []
    for folder in found:
        try:
            checkpoint = read(folder)
            if other := difference(checkpoint.run["identity"], mine):
                raise UserError(f"{where} is another run ({other}): choose another or remove it")
            if (done := checkpoint.run["progress"]["step"]) > config.steps:
                raise UserError(f"steps={config.steps}: the run of {where} has done {done} steps already")
            if thorough:
                verify(checkpoint, elsewhere=True)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        return Start(checkpoint, continues, tuple(refused))
    raise UserError(f"{where}: none of its {len(found)} checkpoints can be used: {refused[0]}")


def _left(out_dir: Path) -> str:
    """What is there of which a run would write its own, or ""."""
    if folders(out_dir / "checkpoints"):
        return "checkpoints"
    return next((name for name in LEFT if (out_dir / name).exists()), "")


def _same(out_dir: Path, config: RunConfig, taken: str) -> RunConfig:
    """The config of the run in `out_dir`, which is this run."""
    theirs = _config(out_dir)
    if theirs is None:
        raise UserError(f"{taken}, whose config.yaml is no config of this version: choose another or remove it")
    if other := difference(identity(theirs), identity(config)):
        raise UserError(f"{taken}, another one ({other}): choose another or remove it")
    return theirs


def _config(out_dir: Path) -> RunConfig | None:
    try:
        values = yaml.safe_load((out_dir / "config.yaml").read_text())
        return validate(renewed(values)) if isinstance(values, dict) else None
    except (OSError, ValueError, yaml.YAMLError, UserError):
        return None


def _finished(out_dir: Path) -> int | None:
    """The steps of a run that has ended; None for one that has not."""
    try:
        return int(json.loads((out_dir / "summary.json").read_text())["steps"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out_dir / 'summary.json'} cannot be read: choose another out_dir or remove it") from None


def check_model(start: Start, model: ModelConfig) -> None:
    """Raises UserError where a model's folder now holds another shape."""
    if start.checkpoint is None:
        return
    theirs, mine = asdict(replace(start.checkpoint.model, adapter=None)), asdict(model)  # adapters: by the identity
    for field, value in mine.items():
        if theirs[field] != value:
            where = start.checkpoint.folder
            raise UserError(f"the model of {where} is another: {field}={theirs[field]} there, {field}={value} here")


def logged(start: Start, out_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of both logs that this run goes on from. What is missing of them is said: no run can be held up by its
    log."""
    if start.checkpoint is None:
        return [], []
    folder = out_dir if start.continues else start.checkpoint.folder.parent.parent
    rows = []
    for name in LOGS:
        path, end = folder / name, start.progress.log.get(name, 0)
        if (size := path.stat().st_size if path.exists() else 0) < end:
            print(f"samebit: warning: {path} has {size} of the {end} bytes it had: rows are missing", file=sys.stderr)
        try:
            rows.append(read_lines(path, end) if size else [])
        except ReportError as error:
            raise UserError(f"the log of the run cannot be read: {error}") from None
    return rows[0], rows[1]


def prepare_logs(start: Start, out_dir: Path) -> dict[str, int]:
    """Returns where the log of the part that goes on ends, by file: what was logged after the checkpoint is logged again. The
    logs of a run that goes on in another folder are copied there."""
    positions = dict.fromkeys(LOGS, 0) | start.progress.log
    if start.continues:
        for name in ("summary.json", "report.html"):  # of a run that is now longer
            (out_dir / name).unlink(missing_ok=True)
        return positions
    if start.checkpoint:
        for name in LOGS:
            if (log := start.checkpoint.folder.parent.parent / name).exists():
                shutil.copyfile(log, out_dir / name)
        return positions
    return {}
