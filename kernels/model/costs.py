"""Parameters, operations and bytes of a model: the one place that counts them.

Plan, capacity, speed and benchmarks ask here; blocks say what they add (`kernels.model.blocks.Costs`). `tp` is the number of
tensor-parallel ranks, `width` the bytes of an element; bytes are those of one rank.
"""

from collections.abc import Iterable, Sequence

import torch

from kernels.model.blocks import Costs, blocks_of
from kernels.model.config import ModelConfig
from kernels.model.parameter import Parameter
from kernels.model.parameters import layer_parameters, saved, served, trained
from kernels.ops.quantize import FP8
from kernels.tree import Shard

MASTER = 4
"""Bytes of an element of master weights, gradients, moments in float32, and saved models in float32."""
_TILE = 128  # columns of a tile of the head, for each of which the log-prob keeps two float32


def _blocks(config: ModelConfig) -> list[Costs]:
    return [block.costs(config) for layer in range(config.layers) for block in blocks_of(config, layer)]


# Parameters -----------------------------------------------------------------------------------------------------------


def parameter_count(config: ModelConfig) -> int:
    """Counts the numbers of a model directory: a tied head once, no padding."""
    return sum(parameter.elements for parameter in saved(config))


def active_parameters(config: ModelConfig, head: bool = True) -> int:
    """Counts the parameters that multiply each token: not the embedding, which gathers; `head`: with the LM head."""
    blocks = sum(costs.active for costs in _blocks(config))
    return blocks + config.hidden_size + head * table_elements(config)


def table_elements(config: ModelConfig) -> int:
    """Counts the numbers of the embedding; the LM head has as many."""
    return config.vocab_size * config.hidden_size


def outer_elements(config: ModelConfig) -> int:
    """Counts what stands outside the layers of a trainer, which holds a tied head a second time."""
    return 2 * table_elements(config) + config.hidden_size


def layer_elements(config: ModelConfig) -> int:
    """Counts the parameters of the largest layer."""
    return max(sum(p.elements for p in layer_parameters(config, i)) for i in range(config.layers))


def trainer_elements(config: ModelConfig) -> int:
    """Counts the master weights of a trainer, which holds a tied head a second time."""
    return parameter_count(config) + table_elements(config) * config.tied


def adapter_count(config: ModelConfig) -> int:
    """Counts the numbers of a model's adapters, in a file of theirs; 0 where it has none."""
    adapter, count = config.adapter, 0
    for parameter in served(config):
        if adapter and (rank := adapter.rank(parameter)):
            count += rank * (len(parameter.matrices) * parameter.columns + parameter.shape[0])
    return count


def adapted_elements(config: ModelConfig) -> int:
    """Counts the numbers of the weights that have an adapter, of which a trainer keeps the frozen ones beside the merged."""
    adapter = config.adapter
    return sum(p.held for p in served(config) if adapter and adapter.rank(p))


def trained_elements(config: ModelConfig) -> int:
    """Counts what a trainer keeps in float32 with a gradient: all, with a tied head a second time, or the adapters as held."""
    return sum(p.held for p in trained(config)) if config.adapter else trainer_elements(config)


def layer_trained_elements(config: ModelConfig) -> int:
    """Counts the numbers of the largest layer that have a gradient."""
    layers = (layer_parameters(config, i) for i in range(config.layers))
    return max(sum(p.held if config.adapter else p.elements for p in layer if p.trained) for layer in layers)


def outer_trained_elements(config: ModelConfig) -> int:
    """Counts the numbers of adapters outside the layers: the head's."""
    return sum(p.held for p in trained(config) if config.adapter and not p.name.startswith("layers."))


# Operations -----------------------------------------------------------------------------------------------------------


def training_flops(config: ModelConfig, lengths: Iterable[int], head: bool = True) -> float:
    """Counts the operations of forward and backward of whole sequences as the model needs them, not what recomputing adds: 6
    for each active parameter and token, and for causal attention half of the square, backward twice the forward."""
    tokens = squares = 0
    for length in map(int, lengths):
        tokens, squares = tokens + length, squares + length * length
    pairs = sum(costs.pairs for costs in _blocks(config))
    return 6.0 * active_parameters(config, head) * tokens + 3.0 * pairs * squares


# Bytes ----------------------------------------------------------------------------------------------------------------


def file_bytes(config: ModelConfig) -> int:
    """Counts the bytes of a saved model: float32 masters, in every format."""
    return MASTER * parameter_count(config)


def weight_bytes(config: ModelConfig, tp: int, width: int) -> int:
    """Counts the bytes of a model's weights on each of `tp` ranks of an engine, as if all were cut."""
    return (width * parameter_count(config) - _spared(config, width)) // tp


def _spared(config: ModelConfig, width: int) -> int:
    """Counts the bytes by which projections in the model's format, with their scales, are less than in its dtype."""
    return sum(width * p.held - _held_bytes(config, p, width) for p in served(config))


def _held_bytes(config: ModelConfig, parameter: Parameter, width: int) -> int:
    if config.quantizes(parameter):
        return FP8.itemsize * parameter.held + torch.float32.itemsize * parameter.scales.held
    return width * parameter.held


def quantizing_bytes(config: ModelConfig, width: int) -> int:
    """Counts the bytes of the largest projection that a trainer holds beside its weight in the backward pass: quantized, and
    multiplied out again; 0 in the plain format."""
    sizes = [_held_bytes(config, p, width) + width * p.held for p in served(config) if config.quantizes(p)]
    return max(sizes, default=0)


def held_bytes(config: ModelConfig, tp: int, width: int) -> int:
    """Counts the bytes that a rank of an engine holds: what is not cut is whole on each, and padding counts."""
    return sum(_held_bytes(config, parameter.part(Shard(0, tp)), width) for parameter in served(config))


def checkpoint_bytes(config: ModelConfig) -> int:
    """Counts the bytes of a checkpoint, all ranks together: master weights and two moments of what is trained."""
    return 3 * MASTER * (trained_elements(config) if config.adapter else parameter_count(config))


def token_bytes(config: ModelConfig, tp: int, width: int) -> int:
    """Counts the bytes of keys and values of one token, in all layers."""
    return width * sum(costs.cached for costs in _blocks(config)) // tp


def step_bytes(config: ModelConfig, contexts: Sequence[float], width: int) -> float:
    """Counts the bytes that a decode step must read on one rank: the weights that any of its tokens passes once, keys and
    values of each context. Of experts: as many as tokens that choose evenly and at random would be expected to pass."""
    more = 0.0
    for count, chosen, each in (costs.experts for costs in _blocks(config)):
        if count:
            more += each * (count * (1 - (1 - chosen / count) ** len(contexts)) - chosen)
    weights = width * (active_parameters(config) + more) - _spared(config, width)
    return weights + sum(contexts) * token_bytes(config, 1, width)


def serving_bytes(config: ModelConfig, tokens: int, rows: int, tp: int, width: int) -> int:
    """Counts the activations of an engine's step of `tokens` tokens, and the logits of the `rows` that it samples."""
    residual = 4 * config.hidden_size  # the stream, the delta to it, a norm and a sum on its way
    inner = max(c.working * (tokens + c.spare) // (tp if c.cut else 1) for c in _blocks(config))
    logits = 3 * 4 * rows * config.vocab_size // tp  # the logits, their noise, and masks
    return width * (tokens * residual + inner) + logits


def saved_elements(config: ModelConfig, checkpointing: str, tokens: int) -> int:
    """Counts the elements that all layers save of `tokens` tokens for the backward pass. `checkpointing`: "layer" keeps what
    goes into a layer, "selective" what is not cheap to compute again, "none" everything."""
    if checkpointing == "layer":
        return 2 * config.hidden_size * config.layers * tokens  # the residual stream and the delta to it
    return sum((c.kept + c.cheap * (checkpointing == "none")) * (tokens + c.spare) for c in _blocks(config))


def layer_saved_elements(config: ModelConfig, tokens: int) -> int:
    """Counts the elements that the largest layer saves of `tokens` tokens if everything is kept."""
    layers = ([b.costs(config) for b in blocks_of(config, i)] for i in range(config.layers))
    return max(sum((c.kept + c.cheap) * (tokens + c.spare) for c in layer) for layer in layers)


def backward_elements(config: ModelConfig, tokens: int) -> int:
    """Counts the elements of `tokens` tokens that are alive in the backward pass of a block, beside what was saved: the
    gradients of its insides, of the residual stream and of its norm."""
    return max(c.working * (tokens + c.spare) for c in _blocks(config)) + 2 * config.hidden_size * tokens


def logprob_bytes(config: ModelConfig, rows: int, width: int, on_gpu: bool) -> int:
    """Counts the bytes that the log-prob of `rows` tokens keeps for its gradient: on a GPU exponentials in bfloat16 and
    a node a tile, on a CPU float32 logits and their gradient."""
    V, H = config.vocab_size, config.hidden_size
    return rows * (2 * V + 8 * V // _TILE + 4 * width * H if on_gpu else 8 * V + 2 * width * H)


def position_table_bytes(config: ModelConfig) -> int:
    """Counts the bytes of rope's cosines and sines."""
    return 4 * config.max_positions * config.head_dim
