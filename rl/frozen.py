"""The model that an algorithm asks beside the policy, and that no step changes: the reference of a KL term, a teacher.

It lives in the trainer's ranks (`trainer/frozen.py`; `frozen_weights.py` brings it there). It is a model directory, or the
weights that RL begins with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kernels.model import ConfigError, ModelConfig
from kernels.weights.folder import ModelFolder
from rl.config import RunConfig
from rl.errors import UserError
from rollout.tokenizer import Tokenizer


@dataclass(frozen=True)
class FrozenModel:
    """Says which model is frozen, and where its weights are."""

    key: str  # that asks for it
    model: ModelConfig
    source: str | int | None  # a model directory, a seed; None: what the warm start ends with


def frozen_model(config: RunConfig, model: ModelConfig) -> FrozenModel | None:
    """Returns what the algorithm asks for; None where it asks for nothing. `model`: the policy's. Raises UserError where it
    cannot be used."""
    asked = config.algorithm.frozen
    if asked is None:
        return None
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        if (value := getattr(config.rollout, name)) != off:
            raise UserError(
                f"rollout.{name}={value} with {asked.key}: the other model's own {name} may leave out a token that was "
                f"sampled, whose log-prob is then -inf; set rollout.{name}={off:g}"
            )
    if asked.path is None:
        initial = config.model.path or config.seed
        return FrozenModel(asked.key, model, None if config.warmup.steps else initial)
    if not Path(asked.path).is_dir():
        raise UserError(f"{asked.key}={asked.path} is no folder")
    folder = ModelFolder(asked.path)
    other = replace(folder.model(model.leaves, folder.published or model.format), numerics=config.numerics)
    other.check_dtype(config.dtype)
    folder.tensors(other)
    return FrozenModel(asked.key, other, asked.path)


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


def check_tokenizer(frozen: FrozenModel, mine: Tokenizer) -> None:
    """Raises UserError where an id stands for another token than in the run's tokenizer, `mine`."""
    if not isinstance(frozen.source, str):
        return
    where = f"{frozen.key}={frozen.source}"
    try:
        theirs = Tokenizer.of(ModelFolder(frozen.source))
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
