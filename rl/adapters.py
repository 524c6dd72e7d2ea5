"""Adapters: which ones a run trains, on what, and when (`trainer/adapters.py` trains them).

A warm start trains the whole model; what it ends with is then frozen. The frozen weights are those of the model directory that
the run was given or, where no directory has them (random weights, a warm start), are kept in out_dir/base. A checkpoint has not
these weights but names their digest: a run that goes on with others is refused.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kernels.model import Adapter, ModelConfig, served
from rl.config import RunConfig
from rl.errors import UserError
from trainer.checkpoint import BASE, Checkpoint
from trainer.folder import whole

ADAPTER = "adapter"
"""The folder in out_dir of what a run has trained, in the format of `peft`."""


def adapted_model(config: RunConfig, model: ModelConfig) -> ModelConfig:
    """Returns the model with the adapters that the config asks for; ConfigError or UserError where it cannot have them."""
    section = config.adapter
    ranks = section.ranks
    if not ranks:
        return model
    if config.algorithm.critic:
        raise UserError(
            f"adapter.rank={section.rank} with algorithm={config.algorithm.name}: its critic is trained whole, beside the "
            f"policy; set adapter.rank=0 or choose another algorithm"
        )
    adapter = Adapter(ranks, section.alpha, section.rslora)
    adapter.check(served(model))
    return replace(model, adapter=adapter)


def first_model(config: RunConfig, model: ModelConfig, checkpoint: Checkpoint | None) -> ModelConfig:
    """Returns the model with which the trainer's processes begin: whole where a warm start is to be done, or is just done."""
    if checkpoint:
        return replace(model, adapter=checkpoint.model.adapter)
    return model if config.warmup.steps else adapted_model(config, model)


def base_of(config: RunConfig, checkpoint: Checkpoint | None) -> str | None:
    """Returns the directory of the weights under the adapters of a checkpoint; None where it holds whole weights."""
    if checkpoint is None or checkpoint.model.adapter is None:
        return None
    if path := given(config):
        return path
    folder, theirs = Path(config.out_dir) / BASE, checkpoint.folder.parent.parent / BASE
    if not folder.is_dir():
        if not theirs.is_dir():
            raise UserError(f"{theirs} is missing: it holds the weights under the adapters of {checkpoint.folder}")
        with whole(folder) as made:
            shutil.copytree(theirs, made, dirs_exist_ok=True)
    return str(folder)


def given(config: RunConfig) -> str | None:
    """The model directory that is frozen as it was given."""
    return config.model.path if config.model.path and not config.warmup.steps else None


def base_folder(config: RunConfig) -> str:
    """Returns the model directory under the adapters of a run, for whoever loads them."""
    return str(Path(given(config) or Path(config.out_dir) / BASE).absolute())


def shown(ranks: Sequence[tuple[str, int]]) -> str:
    """Says which ranks there are: attention 32, mlp 32."""
    return ", ".join(f"{target} {rank}" for target, rank in ranks)
