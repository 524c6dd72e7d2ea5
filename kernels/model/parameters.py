"""The parameters of a model, in a fixed order, as three lists: what is trained, what is served, and what is saved.

They are the same for a model all of whose weights are trained. Each says what it is for: a frozen weight is served and
saved and not trained; an adapter that is merged before weights are published is trained and not served."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels.model.blocks import Weight, Weights, blocks_of
from kernels.model.config import ModelConfig
from kernels.model.parameter import Parameter


@dataclass(frozen=True)
class OuterWeights:
    """Holds what stands outside the layers, on one shard."""

    embed: torch.Tensor  # [V / S, H]; V the rows that are held (`ModelConfig.vocab_rows`)
    norm: torch.Tensor  # [H]
    head: torch.Tensor  # [V / S, H]


def trained(config: ModelConfig) -> list[Parameter]:
    """Lists what the optimizer changes: master weights, moments, gradients. A tied head is no parameter."""
    return [p for p in declared(config) if p.trained]


def served(config: ModelConfig) -> list[Parameter]:
    """Lists what an engine holds, what is published to it, and what both sides' digest is of."""
    return [p for p in declared(config) if p.served]


def saved(config: ModelConfig) -> list[Parameter]:
    """Lists what a model directory holds."""
    return [p for p in declared(config) if p.saved]


def layer_parameters(config: ModelConfig, layer: int) -> list[Parameter]:
    """Lists what the blocks of a layer declare, by their names inside it."""
    own = [parameter for block in blocks_of(config, layer) for parameter in block.parameters(config)]
    return config.adapter.added_to(own) if config.adapter else own


def declared(config: ModelConfig) -> list[Parameter]:
    """Lists what a trainer holds: what is trained, and what is frozen. A tied head is no parameter."""
    rows, padding = (config.vocab_rows,), config.vocab_rows - config.vocab_size
    H = config.hidden_size
    frozen = config.adapter is not None
    out = [Parameter("embed", rows, H, ("model.embed_tokens.weight",), 0, padding, trained=not frozen)]
    for i in range(config.layers):
        out += [parameter.of_layer(i) for parameter in layer_parameters(config, i)]
    out.append(Parameter("norm", (H,), 0, ("model.norm.weight",), None, trained=not frozen))
    if config.head == "value":
        out.append(Parameter("head", (config.value_rows,), H, (), None, served=False, saved=False))
    elif not config.tied:
        head = Parameter("head", rows, H, ("lm_head.weight",), 0, padding, target="head")
        out += config.adapter.added_to([head]) if config.adapter else [head]
    return out


def layer_weights(weights: Mapping[str, Weight], index: int) -> Weights:
    """Picks the weights of a layer, by the names that its blocks know."""
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def outer_weights(weights: Mapping[str, Any]) -> OuterWeights:
    """Picks what stands outside the layers; a tied head is the embedding."""
    return OuterWeights(weights["embed"], weights["norm"], weights.get("head", weights["embed"]))
