"""FSDP2 on the tree: parameters sharded by rows, gradients reduced in tree order. One rank that holds all of them needs none of
it."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from kernels.collectives import TreeGroup
from kernels.collectives.levels import by_levels, subgroup
from kernels.host.pinned import host_tensor
from trainer.model import TrainerModel


def divided(mesh: DeviceMesh, replicas: int) -> tuple[DeviceMesh, dist.ProcessGroup | None]:
    """Divides the ranks of `mesh` into `replicas`, one after another, that hold the model each. Returns the mesh of the ranks
    of this rank's replica, and the group of those that hold the rows it holds, in other replicas; None where there is one. So a
    replica is a subtree of the gradient's tree, and the replicas are its upper levels: no bit depends on how many there are. A
    collective."""
    if replicas == 1:
        return mesh, None
    world, rank = mesh.size(), mesh.get_local_rank()
    size = world // replicas
    own, same = range(rank // size * size, rank // size * size + size), range(rank % size, world, size)
    return DeviceMesh.from_group(subgroup(own), mesh.device_type), subgroup(same)


class TreeReduceScatter:
    """Is the communication object of FSDPModule.set_custom_reduce_scatter: no sum is left to the transport's order. FSDP2 calls
    it on its own stream, beside the backward pass, and keeps the buffers until that stream has used them."""

    def __init__(self, mesh: DeviceMesh, on_host: bool) -> None:
        """A collective."""
        self._ranks = TreeGroup(mesh.get_group(), by_levels(mesh.get_group()))
        # Gradients on the way to the host must be on the stream that takes them there, which only the output is.
        self._in_place = mesh.size() == 1 and not on_host
        self._input: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Allocates a buffer: FSDP2 asks for the input of a sum, then for its output. On one rank that is the input: nothing
        is copied."""
        if self._input is not None:
            output, self._input = self._input, None
            return output
        out = torch.empty(*size, dtype=dtype, device=device)
        self._input = out if self._in_place else None
        return out

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        self._ranks.reduce_scatter(output_tensor, input_tensor)


class TreeAllReduce:
    """Is the hook of FSDPModule.set_all_reduce_hook: adds what the replicas have of a gradient, after its reduce-scatter."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """A collective."""
        self._replicas = TreeGroup(group, by_levels(group))

    def __call__(self, gradient: torch.Tensor) -> None:
        gradient.copy_(self._replicas.all_reduce(gradient, torch.float32))
        if gradient.is_cuda:  # FSDP2 allocates it on another stream than the one that calls this
            gradient.record_stream(torch.cuda.current_stream())


def parallelize(
    model: TrainerModel,
    mesh: DeviceMesh,
    on_host: bool = False,
    forward_only: bool = False,
    replicas: dist.ProcessGroup | None = None,
) -> None:
    """Shards every layer, then the rest, and gives the shards memory; gradients are plain sums (the loss carries its own
    normaliser). `on_host`: master weights and gradients live in host memory, and pass through the device as they are used.
    `forward_only`: there is no backward pass, after which the outer weights would be dropped again. `replicas`: of
    `divided`.

    One rank alone has nothing to gather or to sum, so that without `on_host` there is no FSDP2: the model reads the masters
    where they lie (every op rounds them, to the same bits), and a gradient stays where its op wrote it."""
    device = mesh.device_type
    if mesh.size() == 1 and not on_host and replicas is None:
        _hold_alone(model, mesh)
        return
    # Masters are rounded before they travel: half the bytes, and the bits that every op would round them to.
    rounding = MixedPrecisionPolicy(model.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = CPUOffloadPolicy(pin_memory=device == "cuda") if on_host else OffloadPolicy()
    tree = None if forward_only else TreeReduceScatter(mesh, on_host)
    above = None if forward_only or replicas is None else TreeAllReduce(replicas)
    for module in (*model.layers, model):
        keep = True if forward_only else None  # None: FSDP2's own way
        fully_shard(module, mesh=mesh, reshard_after_forward=keep, mp_policy=rounding, offload_policy=policy)
        assert isinstance(module, FSDPModule)
        if tree is None:
            continue
        module.set_custom_reduce_scatter(tree)  # type: ignore[arg-type]
        if above:
            module.set_all_reduce_hook(above)
        if mesh.size() > 1:
            module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu" if on_host else device)
    if on_host:
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            parameter._local_tensor = host_tensor(parameter.to_local().shape, parameter.dtype, device)
    _place_table(model, device)


def _hold_alone(model: TrainerModel, mesh: DeviceMesh) -> None:
    """Gives the parameters memory, as the one shard that there is."""
    model.to_empty(device=mesh.device_type)
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            shard = DTensor.from_local(parameter.detach(), mesh, [Shard(0)], run_check=False)
            module.register_parameter(name, nn.Parameter(shard, parameter.requires_grad))
    _place_table(model, mesh.device_type)


def _place_table(model: TrainerModel, device: str) -> None:
    cos, sin = model.table
    model.table = cos.to(device), sin.to(device)


def drop_gathered(model: TrainerModel) -> None:
    """Drops the outer weights that a forward pass leaves gathered until a backward pass."""
    if isinstance(model, FSDPModule):
        model.reshard()


def fill(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies this rank's rows of `whole` into its shard."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    parts = whole.chunk(mesh.size(), 0)
    local = parameter.to_local()
    if local.numel():
        local.copy_(parts[mesh.get_local_rank()])


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the whole of a sharded parameter, on every rank: the reverse of `fill`. A collective. (DTensor.full_tensor
    kills the process where CUDA tensors travel over gloo, torch 2.11.)"""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    local, rows = parameter.to_local().to(mesh.device_type), -(-parameter.shape[0] // mesh.size())
    padded = local.new_zeros(rows, *local.shape[1:])
    padded[: local.shape[0]] = local
    return TreeGroup(mesh.get_group()).all_gather(padded).flatten(0, 1)[: parameter.shape[0]]
