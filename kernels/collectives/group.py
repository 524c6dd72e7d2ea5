"""The ranks of one model, and the sums over them."""

import socket
from pathlib import Path

import torch
import torch.distributed as dist

from kernels.collectives.transport import Alone, Collectives, Transport, is_nccl
from kernels.tree import TreeError


def backend_of(device: str, ranks: int, cards: int | None = None) -> str:
    """Chooses the process group for so many ranks on so many cards (None: those of this host): NCCL for one rank per card; gloo
    on the CPU, and where ranks share a card, which NCCL refuses. No bit depends on it."""
    if device == "cpu":
        return "gloo"
    return "nccl" if 1 < ranks <= (torch.cuda.device_count() if cards is None else cards) else "gloo"


def peer_memory(group: dist.ProcessGroup) -> Transport | None:
    """Maps memory that the other ranks write in (`kernels.collectives.peers`), where they have a card each, as NCCL
    demands; None over gloo, for one rank, and for ranks on several hosts. A collective. No bit depends on it."""
    if dist.get_world_size(group) == 1 or not is_nccl(group) or len(set(hosts_of(group))) > 1:
        return None
    from kernels.collectives.peers import PeerMemory  # triton, which a machine without a GPU may lack

    return PeerMemory(group)


def hosts_of(group: dist.ProcessGroup) -> list[str]:
    """Returns the host of every rank: its name and, as two may have one name, when it began to run. A collective."""
    began = Path("/proc/sys/kernel/random/boot_id")
    here = f"{socket.gethostname()} {began.read_text().strip() if began.exists() else ''}"
    hosts = [""] * dist.get_world_size(group)
    dist.all_gather_object(hosts, here, group=group)
    return hosts


class TreeGroup:
    """Holds the ranks that share one model: rank r holds the r-th subtree of every sum.

    `TreeGroup()` is the whole model on one rank, where each method is the identity (and the one rounding). Invariant to the
    size of the group: a sum over T subtree roots has the bits of the unsharded tree.

    The transport is chosen here, once: `TreeGroup(group)` moves bytes by the collectives of the process group,
    `TreeGroup(group, PeerMemory(group))` by kernels that write in the other cards' memory, several times faster for small
    messages. The bits are the same. There is no fallback: what a transport cannot move is an error.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, transport: Transport | None = None) -> None:
        """Joins the ranks. `transport`: another one than the collectives of `group`; of the same ranks, where both are
        given."""
        own = None if group is None else Collectives(group)
        self.transport: Transport = transport or own or Alone()
        if own is not None and self.transport.shard != own.shard:
            raise TreeError(
                f"the transport is of {self.transport.shard}, the group of {own.shard}: make it of the same group"
            )
        self.shard = self.transport.shard

    @property
    def capturable(self) -> bool:
        """Says whether a CUDA graph can hold these collectives: not those that go through the host, as gloo's do."""
        return self.shard.size == 1 or self.transport.capturable

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Sums float32 `partial` (any shape) over ranks on the tree, rounded once to `dtype`; the same on every rank.
        On one rank, where the partial is the root, it may come in `dtype`."""
        if self.shard.size == 1 and partial.dtype in (torch.float32, dtype):
            return partial.to(dtype)
        if partial.dtype != torch.float32:
            raise TreeError(f"all_reduce takes unrounded float32 roots, got {partial.dtype}")
        return self.transport.all_reduce(partial, dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tensor of every rank, [size, *x.shape], in rank order."""
        return x[None] if self.shard.size == 1 else self.transport.all_gather(x)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Writes into output [n] the tree sum over ranks of their r-th part of input [size * n]; both float32.

        Each rank receives every rank's part unreduced and adds in tree order, so the result does not depend on the
        transport."""
        size = self.shard.size
        if {input.dtype, output.dtype} != {torch.float32} or input.numel() != size * output.numel():
            raise TreeError(f"reduce_scatter: {input.dtype} of {input.numel()} into {output.numel()} x {size} ranks")
        if size == 1:
            output.copy_(input.view_as(output))
        else:
            self.transport.reduce_scatter(output, input)
