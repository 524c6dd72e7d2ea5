"""Brings frozen models (`frozen.py`) to the trainer's ranks, one at a time, and freezes what adapters are trained on.

The weights that RL begins with are the initial ones or, after a warm start, kept as a model directory in out_dir/reference. A
checkpoint does not have the frozen weights but names their digest: a run that goes on with others is refused.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from kernels.model import ModelConfig
from kernels.weights.beside import Beside
from rl.adapters import adapted_model, base_folder, first_model, given
from rl.checkpoints import Checkpoints, Progress
from rl.config import RunConfig
from rl.errors import UserError
from rl.frozen import FrozenModel
from rl.resume import REFERENCE, Start
from trainer.checkpoint import Checkpoint
from trainer.folder import whole


class Trainer(Protocol):
    """Declares what is asked of the trainer."""

    def freeze(self, model: ModelConfig, source: str | int) -> str:
        """Takes in a model that is never trained; returns the digest of its weights."""

    def thaw(self) -> None:
        """Lets the frozen model go."""

    def begin_adapters(self, model: ModelConfig) -> None:
        """Freezes what was trained so far, and trains adapters on it."""

    def digest(self) -> str:
        """Returns the SHA-256 of the weights as they are served."""

    def save(self, directory: str, beside: Beside) -> str:
        """Writes the policy as a model directory; returns the digest of its weights."""


def freeze(
    frozen: FrozenModel | None, trainer: Trainer, begin: Start, state: Progress, out_dir: Path, beside: Beside
) -> Progress:
    """Brings the frozen model of RL to the trainer's ranks, which have the policy as RL goes on with it; returns `state` with
    its digest. UserError where the checkpoint that the run began at names another. `beside`: what stands beside the weights
    that are kept."""
    if frozen is None:
        return state
    source = frozen.source
    if source is None:
        folder = out_dir / REFERENCE
        if state.step == 0:
            trainer.save(str(folder), beside)
        elif not folder.exists():
            _bring(begin, folder)
        source = str(folder)
    return _freeze(frozen, source, trainer, state, begun=state.step > 0)


def freeze_for_pairs(paired: FrozenModel, trainer: Trainer, state: Progress) -> Progress:
    """Brings, as `freeze` does, the reference of a warm start that is still to be done."""
    assert paired.source is not None
    return _freeze(paired, paired.source, trainer, state, begun=state.supervised > 0)


def _freeze(frozen: FrozenModel, source: str | int, trainer: Trainer, state: Progress, begun: bool) -> Progress:
    """`begun`: a step was taken with what the state names."""
    return same(frozen.key, source, trainer.freeze(frozen.model, source), state, begun)


def same(key: str, source: str | int, found: str, state: Progress, begun: bool) -> Progress:
    """Returns `state` with the digest `found` of the weights that are asked, from `source`. UserError, which names `key`, where
    a step was taken (`begun`) with others."""
    if begun and state.frozen_sha256 not in ("", found):
        raise UserError(
            f"{key}: {source} has other weights than the run began with: sha256 {found[:12]}, the checkpoint says "
            f"{state.frozen_sha256[:12]}"
        )
    return replace(state, frozen_sha256=found)


def _bring(begin: Start, folder: Path) -> None:
    """Copies the kept weights of the run that goes on in another folder."""
    assert begin.checkpoint is not None
    theirs = begin.checkpoint.folder.parent.parent / REFERENCE
    if not theirs.is_dir():
        raise UserError(
            f"{theirs} is missing: it holds the weights that RL began with, which algorithm.kl_coef asks for"
        )
    with whole(folder) as made:
        shutil.copytree(theirs, made, dirs_exist_ok=True)


def begin_adapters(
    config: RunConfig,
    model: ModelConfig,
    trainer: Trainer,
    begun: Checkpoint | None,
    state: Progress,
    checkpoints: Checkpoints,
    beside: Beside,
) -> Progress:
    """Makes the trainer one of adapters, where the config asks for any, once the warm start is done; returns `state` with the
    digest of the frozen weights. `begun`: the checkpoint that the run began at; `beside`: what stands beside weights that are
    kept."""
    adapted = adapted_model(config, model)
    if adapted.adapter is None:
        return state
    checkpoints.model = adapted
    if begun and begun.model.adapter:
        return state
    if not given(config):
        trainer.save(base_folder(config), beside)
    if first_model(config, model, begun).adapter is None:
        trainer.begin_adapters(adapted)
    return replace(state, base_sha256=trainer.digest())
