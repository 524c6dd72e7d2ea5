"""Which model a run trains: a directory, or random weights of a given shape."""

import math
from dataclasses import replace

from kernels.model import ModelConfig
from kernels.model.weights import find
from rl.config import RunConfig
from rl.errors import UserError


def model_config(config: RunConfig, vocabulary: int | None) -> ModelConfig:
    """`vocabulary`: tokens of the tokenizer, or None where it is not known yet and the config must say."""
    section = config.model
    if section.path:
        model = ModelConfig.from_directory(section.path, section.leaves)
        find(model, section.path)
    else:
        hf = dict(section.hf)
        for field, value in hf.items():
            _check_field(field, value)
        if hf.get("vocab_size") is None:
            if vocabulary is None:
                raise UserError("model.hf.vocab_size is null and there is no tokenizer to take it from")
            unit = 4 * section.leaves  # every leaf of the vocabulary is a multiple of 4
            hf["vocab_size"] = -(-vocabulary // unit) * unit
        model = ModelConfig.from_hf(hf, section.leaves)
    if vocabulary is not None and vocabulary > model.vocab_size:
        raise UserError(f"the tokenizer has {vocabulary} tokens, the model's vocabulary {model.vocab_size}")
    model.check_shards(config.rollout.tp)
    return replace(model, numerics=config.numerics)


_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings")
_REALS = ("rms_norm_eps", "rope_theta")


def _check_field(field: str, value: object) -> None:
    count = field in _COUNTS or field.startswith("num_")
    if value is None or not (count or field in _REALS):
        return
    kinds = int if count else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise UserError(f"model.hf.{field}={value!r} must be a positive {'integer' if count else 'number'}")
