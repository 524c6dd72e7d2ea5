"""The model that an algorithm asks beside the policy, and that no step changes: the reference of a KL term, a teacher.

It lives in the trainer's ranks (`trainer/frozen.py`; `frozen_weights.py` brings it there). It is a model directory, or the
weights that RL begins with. One that transformers computes is another thing: `hosted/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kernels.model import ConfigError, ModelConfig
from kernels.weights.folder import ModelFolder
from rl.algorithms.algorithm import FrozenAsked
from rl.config import RunConfig
from rl.errors import UserError
from rollout.tokenizer import Tokenizer


@dataclass(frozen=True)
class FrozenModel:
    """Says which model is frozen, and where its weights are."""

    key: str  # that asks for it
    model: ModelConfig
    source: (
        str | int | None
    )  # a model directory, a seed; None: what RL begins with, after a warm start or with adapters


def frozen_model(config: RunConfig, model: ModelConfig) -> FrozenModel | None:
    """Returns what the algorithm asks the exact kernels for; None where it asks them for nothing. `model`: the policy's. Raises
    UserError where it cannot be used."""
    asked = config.algorithm.frozen
    if asked is None or asked.device_map is not None:
        return None
    path = folder_of(config, asked)
    if path is None:
        initial = config.model.path or config.seed
        return FrozenModel(asked.key, model, None if config.warmup.steps or config.adapter.path else initial)
    folder = ModelFolder(path)
    try:
        other = replace(folder.model(model.leaves, folder.published or model.format), numerics=config.numerics)
        other.check_dtype(config.dtype)
    except ConfigError as error:
        raise UserError(
            f"{asked.key}={path}: {error}; with algorithm.device_map=auto transformers computes it, in its own arithmetic"
        ) from None
    folder.tensors(other)
    check_vocabulary(f"{asked.key}={path}", other.vocab_size, model.vocab_size)
    return FrozenModel(asked.key, other, path)


def folder_of(config: RunConfig, asked: FrozenAsked) -> str | None:
    """Returns the model directory that is asked, by whatever computes it; None: the weights that RL begins with. Raises
    UserError where it is no folder, or sampling is filtered."""
    _check_filters(config, asked.key)
    if asked.path is not None and not Path(asked.path).is_dir():
        raise UserError(f"{asked.key}={asked.path} is no folder")
    return asked.path


def _check_filters(config: RunConfig, key: str) -> None:
    """Raises UserError where sampling is filtered and another model is asked, by `key`, for log-probs."""
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        if (value := getattr(config.rollout, name)) != off:
            raise UserError(
                f"rollout.{name}={value} with {key}: the other model's own {name} may leave out a token that was sampled, "
                f"whose log-prob is then -inf; set rollout.{name}={off:g}"
            )


def check_vocabulary(where: str, theirs: int, mine: int) -> None:
    """Raises UserError where the policy may sample an id that the other model, at `where`, does not have."""
    if theirs < mine:
        raise UserError(
            f"{where}: its vocabulary of {theirs} is smaller than the policy's of {mine}, which may sample an id beyond it"
        )


def preference_model(config: RunConfig, model: ModelConfig) -> FrozenModel | None:
    """Returns the reference of a warm start by pairs, its initial weights; None where the warm start is another."""
    if not config.warmup.steps or config.warmup.kind != "dpo":
        return None
    if config.trainer.leaf_sequences % 2 or config.warmup.sequences % 2:
        raise UserError(
            f"warmup.kind=dpo with trainer.leaf_sequences={config.trainer.leaf_sequences} and "
            f"warmup.sequences={config.warmup.sequences}: both must be even, so that each leaf holds whole pairs"
        )
    return FrozenModel("warmup.kind=dpo", model, config.model.path or config.seed)


def check_tokenizer(key: str, folder: str, mine: Tokenizer, exact: bool = True) -> None:
    """Raises UserError where an id stands for another token in the model directory that `key` names than in `mine`, the run's
    tokenizer. `exact`: the exact kernels are to compute that model."""
    where = f"{key}={folder}"
    try:
        theirs = Tokenizer.of(ModelFolder(folder), known=exact)
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from None
    if theirs is None:
        raise UserError(f"{where} holds no tokenizer (tokenizer.json): nothing says that its ids are the run's")
    here, there = _tokens(mine), _tokens(theirs)
    for i in sorted(here.keys() | there.keys()):
        if here.get(i) != there.get(i):
            raise UserError(
                f"{where} has another tokenizer: id {i} is {there.get(i)!r} there and {here.get(i)!r} here; the two models "
                f"must share one"
            )


def _tokens(tokenizer: Tokenizer) -> Mapping[int, str]:
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return {number: token for token, number in vocabulary.items()}
