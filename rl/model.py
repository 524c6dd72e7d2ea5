"""Which model a run trains: a directory, or random weights of a given shape."""

from kernels.model import ModelConfig
from rl.config import RunConfig
from rl.errors import UserError


def model_config(config: RunConfig, vocabulary: int | None) -> ModelConfig:
    """`vocabulary`: tokens of the tokenizer, or None where it is not known yet and the config must say."""
    section = config.model
    if section.path:
        model = ModelConfig.from_directory(section.path, section.leaves)
    else:
        hf = dict(section.hf)
        if hf.get("vocab_size") is None:
            if vocabulary is None:
                raise UserError("model.hf.vocab_size is null and there is no tokenizer to take it from")
            unit = 4 * section.leaves  # every leaf of the vocabulary is a multiple of 4
            hf["vocab_size"] = -(-vocabulary // unit) * unit
        model = ModelConfig.from_hf(hf, section.leaves)
    if vocabulary is not None and vocabulary > model.vocab_size:
        raise UserError(f"the tokenizer has {vocabulary} tokens, the model's vocabulary {model.vocab_size}")
    model.check_shards(config.rollout.tp)
    return model
