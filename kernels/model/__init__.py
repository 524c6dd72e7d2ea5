"""The one model definition, its weights on disk and in shards, and the layouts it runs under."""

from kernels.model.config import ConfigError, ModelConfig
from kernels.model.decoder import (
    Again,
    LayerWeights,
    OuterWeights,
    decoder_layer,
    forward,
    head_logits,
    position_table,
    remembered,
    token_logprobs,
)
from kernels.model.layout import Layout, PagedCache, on_device

__all__ = [
    "Again",
    "ConfigError",
    "LayerWeights",
    "Layout",
    "ModelConfig",
    "OuterWeights",
    "PagedCache",
    "decoder_layer",
    "forward",
    "head_logits",
    "on_device",
    "position_table",
    "remembered",
    "token_logprobs",
]
