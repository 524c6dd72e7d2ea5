"""The checkpoints of a run: when, with what, and which ones stay."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kernels.model import ModelConfig
from kernels.weights.beside import Beside
from rl.cluster import TrainerFleet
from rl.config import CheckpointSection
from rl.errors import RunError, SaveError
from rl.run.log import RunLog
from trainer.checkpoint import BESIDE, described, finish, folder_name, folders
from trainer.folder import remove, temporary

_NOTHING: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True)
class Progress:
    """Says how far a run is: with the trainer's state, all that a resumed one needs. There is no generator state: every draw is
    keyed by the seed and the step."""

    supervised: int = 0  # steps of the warm start
    step: int = 0  # GRPO steps
    warmup_cursor: int = 0  # problems taken by the warm start
    cursor: int = 0  # problems taken by GRPO
    tokens_compared: int = 0
    tokens_nonzero: int = 0
    accuracy: tuple[float, ...] = ()  # held out, before GRPO; empty before it is known
    frozen_sha256: str = ""  # of the frozen model's weights (`rl/frozen.py`), where there is one
    base_sha256: str = ""  # of the weights under adapters (`rl/adapters.py`), where there are any
    seconds: float = 0.0
    log: dict[str, int] = field(default_factory=dict)  # bytes of each log file that belong to the steps above


@dataclass(frozen=True)
class _Pending:
    folder: Path
    progress: Progress
    optimizer_steps: int
    weights_sha256: str
    files: Mapping[str, bytes]  # beside those that every checkpoint has


class Checkpoints:
    """Writes one save at a time: the ranks write in the background, `settle` gives the folder its name when all are done."""

    def __init__(
        self,
        out_dir: Path,
        config: CheckpointSection,
        trainer: TrainerFleet,
        model: ModelConfig,
        log: RunLog,
        since: float,
        files: Mapping[str, bytes],
        facts: Mapping[str, Any],
    ) -> None:
        """`since`: when the run began (time.perf_counter). `files`: what goes beside the shards. `facts`: what the manifest
        says of the run beside its progress."""
        self._root, self._config, self._trainer = out_dir / "checkpoints", config, trainer
        self.model = model
        """What the trainer holds: with adapters, once it has any."""
        self._log, self._since, self._files, self._facts = log, since, files, facts
        self._pending: _Pending | None = None

    def due(self, step: int, last: int) -> bool:
        """Says whether a save is due after step `step` of `last`."""
        return bool(self._config.every) and (step % self._config.every == 0 or step == last)

    def save(self, progress: Progress, weights_sha256: str, files: Mapping[str, bytes] = _NOTHING) -> None:
        """Begins a checkpoint of the trainer's state as it is now, once the one before is complete; with `files` beside it."""
        self.settle(wait=True)
        progress = replace(progress, seconds=round(time.perf_counter() - self._since, 1), log=self._log.positions())
        try:
            folder = temporary(self._root / folder_name(progress.supervised + progress.step))
        except OSError as error:
            raise RunError(f"the checkpoint could not be written: {error.strerror}: {self._root}") from None
        self._pending = _Pending(folder, progress, self._trainer.snapshot(folder), weights_sha256, files)

    def settle(self, wait: bool = False) -> None:
        """Completes what the ranks have written; with `wait`, waits for them. Then only the newest `keep` stay."""
        if self._pending is None:
            return
        done = self._pending
        step = done.progress.supervised + done.progress.step
        final = self._root / folder_name(step)
        try:
            shards = self._trainer.written(wait)
        except SaveError as error:
            kept = [f"{p} stays the newest" for p in folders(self._root)[:1]]
            raise SaveError("; ".join([f"step {step}: {error}", *kept])) from None
        if shards is None:
            return
        self._pending = None
        run = {**self._facts, "progress": asdict(done.progress)}
        files = {**self._files, **done.files}
        what = (self.model, done.optimizer_steps, done.weights_sha256, shards, files, run)
        nodes = self._trainer.writers_away()
        manifest = described(*what, {s.name: host for s, host in zip(shards, nodes, strict=True) if host})
        self._trainer.finish_away(done.folder, final, manifest)
        try:  # after all others: without it there is no checkpoint
            finish(done.folder, final, manifest, files)
        except OSError as error:
            raise RunError(f"the checkpoint {final} could not be written: {error.strerror}") from None
        older = [p for p in folders(self._root) if p.name <= final.name]
        for folder in older[self._config.keep :]:
            remove(folder)
        self._trainer.prune_away(self._root, final.name, self._config.keep)


def beside_files(beside: Beside, model: ModelConfig) -> dict[str, bytes]:
    """Returns what a checkpoint of float32 masters holds for `trainer.export`, by path."""
    return {f"{BESIDE}/{name}": content for name, content in beside.contents(model, torch.float32).items()}
