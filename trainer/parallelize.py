"""FSDP2 on the tree: parameters sharded by rows, gradients reduced in tree order."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from kernels.collectives import TreeGroup, reduce_scatter
from trainer.model import TrainerModel


class TreeReduceScatter:
    """The communication object of FSDPModule.set_custom_reduce_scatter: no sum is left to the transport's order."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        reduce_scatter(output_tensor, input_tensor, group)


def parallelize(model: TrainerModel, mesh: DeviceMesh) -> None:
    """Shards every layer, then the rest; gradients are plain sums (the loss carries its own normaliser)."""
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_custom_reduce_scatter(TreeReduceScatter())  # type: ignore[arg-type]
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def fill(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies this rank's rows of `whole` into its shard."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    parts = whole.chunk(mesh.size(), 0)
    local = parameter.to_local()
    if local.numel():
        local.copy_(parts[mesh.get_local_rank()])


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded parameter, on every rank: the reverse of `fill`. A collective. (DTensor.full_tensor kills the
    process where CUDA tensors travel over gloo, torch 2.11.)"""
    assert isinstance(parameter, DTensor)
    local, rows = parameter.to_local(), -(-parameter.shape[0] // parameter.device_mesh.size())
    padded = local.new_zeros(rows, *local.shape[1:])
    padded[: local.shape[0]] = local
    return TreeGroup(parameter.device_mesh.get_group()).all_gather(padded).flatten(0, 1)[: parameter.shape[0]]
