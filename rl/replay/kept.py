"""Keeps a step's batch in a folder, with the weights that sampled it, so that it can be computed again alone.

out_dir/batches/00000003/
    batch.npz    the columns of the batch; `trainer_logprobs` of the rows of the first update, where it was trained on
    batch.json   step, numerics, dtype, device, family of GPU kernels
    model/       a Hugging Face model directory in float32: the weights before the step's update, where they were asked for
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.model import ConfigError, ModelConfig, Parameter
from kernels.weights.beside import DTYPES
from kernels.weights.files import load
from kernels.weights.folder import ModelFolder
from rl.errors import UserError
from rl.run.files import read_mapping, write_atomic
from trainer import checkpoint, export
from trainer.batch import Batch, BatchError
from trainer.folder import whole

BATCHES = "batches"
_ARRAYS, _ABOUT, _MODEL = "batch.npz", "batch.json", "model"
_TRAINER = "trainer_logprobs"


@dataclass(frozen=True)
class Kept:
    """Holds a batch that a run kept, and where its weights are."""

    folder: Path
    batch: Batch
    trainer_logprobs: np.ndarray | None  # float32, of the rows of the first update; None: it was not trained on
    step: int
    numerics: str
    dtype: torch.dtype
    device: str
    family: str = "auto"  # of the kernels that a GPU ran, as the config of the run said

    @property
    def differing(self) -> int:
        """Counts the log-probs that differed when they were recorded."""
        if self.trainer_logprobs is None:
            return 0
        first = self.batch.logprobs[: len(self.trainer_logprobs)]
        return int((self.trainer_logprobs.view(np.uint32) != first.view(np.uint32)).sum())

    def model(self) -> ModelConfig:
        """Reads the shape of the model whose weights `weights` yields. UserError where there are none."""
        config = ModelFolder(self._model).model() if self._model.is_dir() else self._checkpoint().model
        return replace(config, numerics=self.numerics)  # type: ignore[arg-type]

    def weights(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """Yields the weights that sampled the batch, whole and float32, one at a time: those kept beside it, or those of the
        run's checkpoint of the step before."""
        if self._model.is_dir():
            return load(self.model(), self._model)
        return export.weights(self._checkpoint())

    @property
    def _model(self) -> Path:
        return self.folder / _MODEL

    def _checkpoint(self) -> checkpoint.Checkpoint:
        run = self.folder.parent.parent
        for folder in checkpoint.folders(run / "checkpoints"):
            found = checkpoint.read(folder)
            if found.run.get("progress", {}).get("step") == self.step - 1:
                checkpoint.verify(found)
                return found
        raise UserError(
            f"{self.folder} holds no weights, and {run / 'checkpoints'} none of step {self.step - 1}: the same run again with "
            f"align.keep_batches=[{self.step}] keeps them (its bits are the same)"
        )


def keep(
    out_dir: Path,
    step: int,
    batch: Batch,
    trainer_logprobs: np.ndarray | None,
    about: dict[str, Any],
    save_model: Callable[[str], object] | None = None,
) -> Path:
    """Writes the folder of a step, whole or not at all, and returns it. `save_model` writes the weights into a folder."""
    final = out_dir / BATCHES / f"{step:08}"
    final.parent.mkdir(exist_ok=True)
    arrays = {f.name: getattr(batch, f.name) for f in fields(batch) if getattr(batch, f.name) is not None}
    if trainer_logprobs is not None:
        arrays[_TRAINER] = trainer_logprobs
    with whole(final) as folder:
        if save_model:
            save_model(str(folder / _MODEL))
        with open(folder / _ARRAYS, "wb") as file:
            np.savez(file, **arrays)
        write_atomic(folder / _ABOUT, json.dumps({"step": step} | about, indent=1) + "\n")
    return final


def add_trainer(folder: Path, logprobs: np.ndarray) -> None:
    """Adds what the trainer computed to a batch that was kept before its update."""
    with np.load(folder / _ARRAYS) as held:
        arrays = {name: held[name] for name in held.files} | {_TRAINER: logprobs}
    temporary = folder / f".{_ARRAYS}"
    with open(temporary, "wb") as file:
        np.savez(file, **arrays)
    temporary.replace(folder / _ARRAYS)


def read(folder: Path) -> Kept:
    """Reads what a run kept. UserError where it is none, or damaged. No pickle is loaded."""
    about = read_mapping(folder / _ABOUT)
    if not about:
        raise UserError(f"{folder} holds no batch that a run kept ({_ABOUT}); align.keep_batches=[STEP] keeps one")
    names = [f.name for f in fields(Batch)]
    try:
        with np.load(folder / _ARRAYS) as file:
            held = {name: file[name] for name in file.files}
        batch = Batch(**{name: held[name] for name in names if name in held})
        return Kept(
            folder, batch, held.get(_TRAINER), int(about["step"]), str(about["numerics"]),
            DTYPES[about["dtype"]], str(about["device"]), str(about.get("family", "auto")),
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, BatchError, ConfigError) as error:
        raise UserError(f"{folder} holds a damaged batch: {' '.join(str(error).split())[:200]}") from None


def folders(path: Path) -> list[Path]:
    """Lists the kept batches of a run's folder, of its folder `batches`, or the one that `path` is; the earliest first."""
    if (path / _ABOUT).exists():
        return [path]
    for parent in (path / BATCHES, path):
        if found := sorted(p.parent for p in parent.glob(f"[0-9]*/{_ABOUT}")):
            return found
    return []
