"""Finds the model that a run trains: a directory, or random weights of a given shape."""

from dataclasses import replace
from pathlib import Path

from kernels.model import ModelConfig
from kernels.model.fields import TOKENS
from kernels.model.formats import PLAIN, Format
from kernels.weights.beside import LEAVES, Beside, Contract
from kernels.weights.folder import ModelFolder
from rl.adapters import with_adapter
from rl.config import RunConfig
from rl.errors import UserError
from rollout.tokenizer import Tokenizer


def resolved(config: RunConfig) -> RunConfig:
    """Returns `config` with what the contract of its model says of leaves, dtype and format, and the adapter that it begins
    with of ranks, where the user does not."""
    section = config.model
    folder = _folder(section.path) if section.path else None
    own = folder.contract if folder else None
    leaves = section.leaves or (own.leaves if own else LEAVES)
    dtype = own.dtype if own and section.dtype == "auto" else section.dtype
    format = section.format if section.format != "auto" else folder.format if folder else PLAIN
    told = {"leaves": leaves, "dtype": dtype, "format": format}
    return config.model_copy(update={"model": section.model_copy(update=told), "adapter": with_adapter(config)})


def contract_of(config: RunConfig, model: ModelConfig) -> Contract:
    """Makes the contract of the run's model: its leaves, its format, and the dtype it is computed in."""
    return Contract.of(model, config.dtype)


def remarks(config: RunConfig, model: ModelConfig) -> list[str]:
    """Says where the run computes otherwise than its model's contract says: lines that name both."""
    if not config.model.path:
        return []
    return _folder(config.model.path).remarks(contract_of(config, model), "model.leaves", "model.dtype", "model.format")


def beside(config: RunConfig, model: ModelConfig, tokenizer: Tokenizer) -> Beside:
    """Returns what stands beside the weights that the run saves."""
    return Beside(contract_of(config, model), tokenizer.fields, tokenizer.files)


def model_config(config: RunConfig, vocabulary: int | None) -> ModelConfig:
    """Returns the model's shape, checked. `vocabulary`: tokens of the tokenizer, or None where it is not known yet and the
    config must say."""
    section = config.model
    leaves = section.leaves or LEAVES
    if section.path:
        folder = _folder(section.path)
        model = folder.model(leaves, None if section.format == "auto" else section.format)
        folder.tensors(model)
    else:
        hf = dict(section.hf)
        if ids := [name for name in TOKENS if hf.get(name) is not None]:
            raise UserError(f"model.hf.{ids[0]}={hf[ids[0]]!r}: random weights have the ids of the data's tokenizer")
        if hf.get("vocab_size") is None:
            if vocabulary is None:
                raise UserError("model.hf.vocab_size is null and there is no tokenizer to take it from")
            unit = 4 * leaves  # every leaf of the vocabulary is a multiple of 4
            hf["vocab_size"] = -(-vocabulary // unit) * unit
        format: Format = PLAIN if section.format == "auto" else section.format
        model = ModelConfig.from_hf(hf, leaves, lambda field, value: f"model.hf.{field}={value}", format)
    if vocabulary is not None and vocabulary > model.vocab_size:
        raise UserError(f"the tokenizer has {vocabulary} tokens, the model's vocabulary {model.vocab_size}")
    if (coefficient := config.trainer.router_aux_loss_coef) and not model.experts:
        raise UserError(f"trainer.router_aux_loss_coef={coefficient:g}: the model has no experts")
    model.check_shards(config.rollout.tp)
    model.check_dtype(config.dtype)
    return replace(model, numerics=config.numerics)


def critic_model(model: ModelConfig) -> ModelConfig:
    """Returns the shape of a critic: the policy's body with a value head."""
    return replace(model, tied=False, head="value")


def _folder(path: str) -> ModelFolder:
    if not Path(path).is_dir():
        raise UserError(f"model.path={path} is no folder")
    return ModelFolder(path)
