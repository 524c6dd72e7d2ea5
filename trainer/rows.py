"""The rows of a sharded model that this rank holds: found, and filled from whatever holds the weights."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from kernels.model import Parameter, declared
from kernels.weights.files import find, read_rows
from kernels.weights.reshard import fsdp_rows
from trainer.model import TrainerModel
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
