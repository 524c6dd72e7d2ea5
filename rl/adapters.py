"""Adapters: which ones a run trains, on what, and when (`trainer/adapters.py` trains them).

A warm start trains the whole model; what it ends with is then frozen. The frozen weights are those of the model directory that
the run was given or, where no directory has them (random weights, a warm start), are kept in out_dir/base. A checkpoint has not
these weights but names their digest: a run that goes on with others is refused.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from kernels.model import Adapter, ModelConfig, served
from kernels.model.parameter import Target
from kernels.weights.adapters import adapter_of
from kernels.weights.folder import ModelFolder
from rl.config import AdapterSection, RunConfig
from rl.errors import UserError
from trainer.checkpoint import BASE, Checkpoint
from trainer.folder import whole

_DEFAULTS: dict[str, Any] = {"rank": 0, "alpha": 32.0, "targets": ("attention", "mlp"), "rslora": False}
ADAPTER = "adapter"
"""The folder in out_dir of what a run has trained, in the format of `peft`."""


def with_adapter(config: RunConfig) -> AdapterSection:
    """Returns the section of adapters with what it leaves open: as `adapter.path` has it, else the defaults. UserError where
    both say something else."""
    section = config.adapter
    if section.path is None:
        asked = section.rank
        named = {"targets": tuple(t for t in get_args(Target) if t in asked)} if isinstance(asked, dict) else {}
        left = {n: value for n, value in (_DEFAULTS | named).items() if getattr(section, n) is None}
        return section.model_copy(update=left)
    begun = _begun(config)
    ranks = dict(begun.ranks)
    rank = next(iter(ranks.values())) if len(set(ranks.values())) == 1 else ranks
    found = {"rank": rank, "targets": tuple(ranks), "alpha": begun.alpha, "rslora": begun.rslora}
    for name, theirs in found.items():
        said = getattr(section, name)
        same = set(said or ()) == set(ranks) if name == "targets" else said in (theirs, ranks)
        if said is not None and not same:
            raise UserError(
                f"adapter.{name}={_plain(said)}, and {section.path} has {_plain(theirs)}: leave it out, or leave out "
                f"adapter.path"
            )
    return section.model_copy(update=found)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _begun(config: RunConfig) -> Adapter:
    """Reads which adapters a run begins with."""
    path = config.adapter.path
    assert path is not None
    if config.model.path is None or config.warmup.steps:
        what = f"warmup.steps={config.warmup.steps}" if config.model.path else "model.path=null"
        set_ = "warmup.steps=0" if config.model.path else "model.path to the model directory under them"
        raise UserError(
            f"adapter.path={path} with {what}: adapters are of the weights that they were trained on; set {set_}"
        )
    if not Path(path).is_dir():
        raise UserError(f"adapter.path={path} is no folder")
    return adapter_of(path, ModelFolder(config.model.path).model())


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
    assert section.alpha is not None and section.rslora is not None, "a config that was not resolved"
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
    if given(config):
        return base_folder(config)
    folder, theirs = Path(base_folder(config)), checkpoint.folder.parent.parent / BASE
    if not folder.is_dir():
        if not theirs.is_dir():
            raise UserError(f"{theirs} is missing: it holds the weights under the adapters of {checkpoint.folder}")
        with whole(folder) as made:
            shutil.copytree(theirs, made, dirs_exist_ok=True)
    return str(folder)


def given(config: RunConfig) -> str | None:
    """Returns the model directory that is frozen as it was given; None where there is none."""
    return config.model.path if config.model.path and not config.warmup.steps else None


def base_folder(config: RunConfig) -> str:
    """Returns the model directory under the adapters of a run, for whoever loads them."""
    return str(Path(given(config) or Path(config.out_dir) / BASE).absolute())


def shown(ranks: Sequence[tuple[str, int]]) -> str:
    """Says which ranks there are: attention 32, mlp 32."""
    return ", ".join(f"{target} {rank}" for target, rank in ranks)
