"""The one model definition: its shape, its blocks, their parameters and costs, and the layouts it runs under."""

from kernels.model.adapter import Adapter
from kernels.model.blocks import Delta, Recompute, Routed, Weight, no_recompute, not_told
from kernels.model.config import ConfigError, ModelConfig
from kernels.model.decoder import decoder_layer, forward, head_logits, position_table, token_logprobs, token_values
from kernels.model.layout import Layout, PagedCache, on_device
from kernels.model.parameter import Parameter
from kernels.model.parameters import (
    OuterWeights,
    declared,
    layer_parameters,
    layer_weights,
    outer_weights,
    saved,
    served,
    trained,
)
