"""The frozen weights under a trainer's adapters, and the merge: what the forward pass reads, and what is published, is
W' = W + scale B A, rounded once (`kernels.ops.merge_low_rank`).

FSDP2 gathers the merged rows as it gathers any weight; beside them each rank keeps the frozen rows of the weights that have an
adapter, in the dtype of activations. After every step it merges its rows anew: of B it has the same rows, of A it gathers all.
Whose rows they are changes no bit. Frozen weights have no float32 masters, no moments and no gradients: that of an adapter
comes from the activations (`kernels.ops.with_low_rank_gradient`): nothing of the size of W is ever summed over tokens.
"""

import math
import zlib
from collections.abc import Mapping
from typing import cast

import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.host.pinned import host_tensor
from kernels.model import Adapter, Parameter, served, trained
from kernels.model.adapter import A, B
from kernels.ops import normal
from kernels.weights.adapters import held, read
from kernels.weights.cargo import merge_rows
from kernels.weights.reshard import fsdp_rows
from trainer.model import TrainerModel
from trainer.parallelize import fill, gather
from trainer.rows import local_rows


class Adapters:
    """Keeps one rank's frozen rows; `merge` is called on all ranks."""

    def __init__(self, model: TrainerModel, mesh: DeviceMesh, on_host: bool) -> None:
        """`model` has the frozen weights, which are copied. `on_host`: they live in host memory and pass through the card."""
        adapter = model.config.adapter
        assert adapter is not None
        self._adapter: Adapter = adapter
        self._model, self._mesh = model, mesh
        self._adapted = [p for p in served(model.config) if adapter.rank(p)]
        local, self._frozen = local_rows(model), dict[str, torch.Tensor]()
        for parameter in self._adapted:
            rows = local[parameter.name]
            kept = host_tensor(rows.shape, rows.dtype, mesh.device_type) if on_host else torch.empty_like(rows)
            self._frozen[parameter.name] = kept.copy_(rows)

    @property
    def frozen(self) -> Mapping[str, torch.Tensor]:
        """Returns the frozen rows of all weights that have an adapter, by name, in place."""
        return self._frozen

    @torch.no_grad()
    def begin(self, seed: int) -> None:
        """Draws A from a normal distribution with the variance 1 / (3 K) that the usual uniform one has; B is zero, so that the
        first W' is W. The noise is keyed by (seed, name), and so independent of how A is sharded."""
        named = dict(self._model.named_parameters())
        for parameter in self._adapted:
            rank, matrices = self._adapter.rank(parameter), len(parameter.matrices)
            a = self._adapter.tensors(parameter)[0]
            key, deviation = zlib.crc32(a.name.encode()), 1 / math.sqrt(3 * a.columns)
            drawn = normal((matrices * rank, a.columns), seed, key, deviation).view(matrices, rank, -1)
            whole = torch.zeros(matrices, a.shape[0] // matrices, a.columns)
            whole[:, :rank] = drawn
            fill(named[a.name], whole.view(a.shape))
            cast(torch.Tensor, local_rows(self._model)[parameter.name + B]).zero_()

    @torch.no_grad()
    def load(self, directory: str) -> None:
        """Takes A and B from a folder of `peft`, in the place of `begin`."""
        named, config = dict(self._model.named_parameters()), self._model.config
        for name, whole in held(config, read(directory, config)):
            fill(named[name], whole)

    @torch.no_grad()
    def merge(self) -> None:
        """Writes W' of this rank's rows where the forward pass and the publication read them. A collective."""
        named, local = dict(self._model.named_parameters()), local_rows(self._model)
        for parameter in self._adapted:
            a = gather(named[parameter.name + A].detach())
            mine = fsdp_rows(parameter.shape[0], self._mesh.get_local_rank(), self._mesh.size())
            given = local[parameter.name], self._frozen[parameter.name], a, local[parameter.name + B]
            merge_rows(parameter, mine, *given, self._adapter.scale(parameter))


def adapter_tensors(model: TrainerModel) -> list[tuple[Parameter, torch.Tensor]]:
    """Returns every A and B, whole, float32, on every rank. A collective."""
    named = dict(model.named_parameters())
    return [(p, gather(named[p.name].detach())) for p in trained(model.config)]
