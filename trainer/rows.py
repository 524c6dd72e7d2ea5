"""The rows of a sharded model that this rank holds: found, and filled from whatever holds the weights."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from kernels.model import Parameter, declared
from kernels.ops import Quantized
from kernels.weights.files import find, load_as_stored, read_rows
from kernels.weights.reshard import fsdp_rows
from trainer.model import Block, TrainerModel
from trainer.parallelize import fill

Weights = Iterable[tuple[Parameter, torch.Tensor]] | Path | TrainerModel
"""Whole parameters, one at a time; a Hugging Face model directory, of which each rank reads its rows alone; or a model that is
sharded alike. What none of them has, a value head or an adapter, begins at zero."""


def local_rows(model: TrainerModel) -> dict[str, torch.Tensor]:
    """Returns this rank's rows of every parameter, in place; a tied head is one of them."""
    return {name: cast(DTensor, p.detach()).to_local() for name, p in model.named_parameters()}


def held_rows(model: TrainerModel, mesh: DeviceMesh) -> Iterator[tuple[Parameter, int, int, torch.Tensor]]:
    """Yields every parameter of which this rank holds rows start .. stop, and these, in place."""
    local = local_rows(model)
    for parameter in declared(model.config):
        mine = fsdp_rows(parameter.shape[0], mesh.get_local_rank(), mesh.size())
        if mine:
            yield parameter, mine.start, mine.stop, local[parameter.name]


@torch.no_grad()
def tie(model: TrainerModel) -> None:
    """Makes the head the embedding."""
    local = local_rows(model)
    local["head"].copy_(local["embed"])


@torch.no_grad()
def load(model: TrainerModel, mesh: DeviceMesh, weights: Weights) -> None:
    """Fills this rank's rows, rounded to what they are held in. A tied head is left as it is."""
    for parameter, _, _, held in held_rows(model, mesh):
        if not parameter.saved:
            held.zero_()
    if isinstance(weights, Path):
        where = find(model.config, weights)
        for parameter, start, stop, held in held_rows(model, mesh):
            if parameter.saved:
                held.copy_(read_rows(where, parameter, start, stop))
        return
    if isinstance(weights, TrainerModel):
        theirs = local_rows(weights)
        for parameter, _, _, held in held_rows(model, mesh):
            if parameter.saved:
                held.copy_(theirs[parameter.name])
        return
    named = dict(model.named_parameters())
    for parameter, whole in weights:
        fill(named[parameter.name], whole)


def hold_as_stored(model: TrainerModel, directory: Path) -> None:
    """Makes a model that is not trained, on one rank, multiply with the projections that a directory holds as FP8 as they are
    there, as an engine that loads it does: what a trainer starts from, their values rounded to bfloat16 and quantized again,
    may have other bits."""
    for parameter, held in load_as_stored(model.config, directory):
        if isinstance(held, Quantized):
            _, layer, name = parameter.name.split(".")
            block, device = cast(Block, model.layers[int(layer)]), model.table[0].device
            block.stored[name] = Quantized(held.values.to(device), held.scales.to(device))
