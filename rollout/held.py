"""The weights that one shard of an engine holds: in the model's dtype, and of projections in its format."""

from collections.abc import Mapping

import torch

from kernels.model import ModelConfig, Parameter, Weight, served
from kernels.ops import Quantized
from kernels.ops.quantize import FP8
from kernels.tree import Shard
from rollout.memory import Reclaimable


def weight_memory(config: ModelConfig, shard: Shard, dtype: torch.dtype, device: str) -> Reclaimable:
    """Allocates what a shard holds: each parameter by its name, a quantized one's values, and beside them its scales."""
    shapes: dict[str, tuple[int, ...]] = {}
    others: dict[str, torch.dtype] = {}
    for p in served(config):
        part = p.part(shard)
        shapes[p.name] = part.shape
        if config.quantizes(p):
            shapes[part.scales.name] = part.scales.shape
            others |= {p.name: FP8, part.scales.name: torch.float32}
    return Reclaimable(shapes, dtype, device, others)


def views(config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Weight]:
    """Returns the weights by name, as the model reads them: a quantized one with its scales."""

    def view(p: Parameter) -> Weight:
        return Quantized(tensors[p.name], tensors[p.scales.name]) if config.quantizes(p) else tensors[p.name]

    return {p.name: view(p) for p in served(config)}


def put(config: ModelConfig, parameter: Parameter, target: Weight, whole: Weight, shard: Shard) -> None:
    """Copies a shard's part of a whole parameter into `target`, rounded to its dtype, or quantized if it was not before."""
    if isinstance(whole, Quantized):
        part: Weight = Quantized(parameter.shard(whole.values, shard), parameter.scales.shard(whole.scales, shard))
    else:
        part = parameter.shard(whole, shard)
    if isinstance(target, Quantized):
        copy(target, part if isinstance(part, Quantized) else config.quantize(part.to(target.device)))
        return
    assert isinstance(part, torch.Tensor), f"{parameter.name} is quantized, and the model is not"
    target.copy_(part)


def copy(target: Quantized, made: Quantized) -> None:
    """Copies values and scales."""
    target.values.copy_(made.values)
    target.scales.copy_(made.scales)
