"""The ranks of one model, and the sums over them."""

import operator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from kernels.tree import WHOLE, Shard, TreeError, fold, is_power_of_two

if TYPE_CHECKING:
    from kernels.collectives.peers import PeerMemory

SAVING = 1 << 20
"""`saved_by_slices` from which `all_reduce` over NCCL makes two calls instead of one."""


def saved_by_slices(n: int, size: int) -> int:
    """Bytes that a rank need not receive if it adds its slice of n elements alone. Gathering everything receives
    4 (size - 1) an element; exchanging float32 slices, then slices rounded to 2 bytes, 6 (size - 1) / size."""
    return n * (size - 1) * (4 * size - 6) // size


def backend_of(device: str, ranks: int) -> str:
    """The process group for so many ranks of this host: NCCL for one rank per card; gloo on the CPU, and where ranks share
    a card, which NCCL refuses. No bit depends on it."""
    return "nccl" if device == "cuda" and 1 < ranks <= torch.cuda.device_count() else "gloo"


def peer_memory(group: dist.ProcessGroup) -> "PeerMemory | None":
    """Memory that the other ranks write in (`kernels.collectives.peers`), where they have a card each, as NCCL demands; None
    over gloo, and for one rank. A collective. No bit depends on it."""
    if dist.get_world_size(group) == 1 or not _is_nccl(group):
        return None
    from kernels.collectives.peers import PeerMemory  # triton, which a machine without a GPU may lack

    return PeerMemory(group)


class TreeGroup:
    """The ranks that share one model: rank r holds the r-th subtree of every sum.

    `TreeGroup()` is the whole model on one rank, where each method is the identity (and the one rounding). Invariant to the
    size of the group: a sum over T subtree roots has the bits of the unsharded tree.

    The transport is chosen here, once: `TreeGroup(group)` moves bytes by the collectives of the process group (gloo on the
    CPU, or for several ranks on one card; NCCL for one rank per card), `TreeGroup(group, PeerMemory(group))` by kernels that
    write in the other cards' memory, several times faster for small messages. The bits are the same. There is no
    fallback: what a transport cannot move is an error.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, peers: "PeerMemory | None" = None) -> None:
        self.group, self.peers = group, peers
        self.shard = WHOLE if group is None else Shard(dist.get_rank(group), dist.get_world_size(group))
        if peers is not None and peers.shard != self.shard:
            raise TreeError(
                f"the peer memory is of {peers.shard}, the group of {self.shard}: make it of the same group"
            )

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold these collectives: not those that go through the host, as gloo's do."""
        return self.shard.size == 1 or self.peers is not None or _is_nccl(self.group)

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Tree sum over ranks of float32 `partial` (any shape), rounded once to `dtype`; the same on every rank. On one rank,
        where the partial is the root, it may come in `dtype`."""
        size = self.shard.size
        if size == 1 and partial.dtype in (torch.float32, dtype):
            return partial.to(dtype)
        if partial.dtype != torch.float32:
            raise TreeError(f"all_reduce takes unrounded float32 roots, got {partial.dtype}")
        if self.peers is not None:
            return self.peers.all_reduce(partial, dtype)
        if saved_by_slices(partial.numel(), size) >= SAVING and partial.is_cuda and _is_nccl(self.group):
            return self._exchange_slices(partial, dtype)
        return _root(self.all_gather(partial), dtype)

    def _exchange_slices(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rank r receives the r-th slice of everyone, adds and rounds it; the rounded slices are gathered."""
        rank, size = self.shard.rank, self.shard.size
        n = partial.numel()
        slice_ = -(-n // (16 * size)) * 16  # the last ones may be shorter, or empty
        lengths = [max(0, min(n - r * slice_, slice_)) for r in range(size)]
        parts = partial.new_empty(size, lengths[rank])
        dist.all_to_all_single(
            parts.view(-1), partial.contiguous().view(-1), [lengths[rank]] * size, lengths, group=self.group
        )
        rounded = parts.new_empty(slice_, dtype=dtype)
        rounded[: lengths[rank]] = _root(parts, dtype)
        out = rounded.new_empty(size * slice_)
        dist.all_gather_into_tensor(out, rounded, group=self.group)
        return out[:n].view(partial.shape)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]: the tensor of every rank, in rank order."""
        if self.shard.size == 1:
            return x[None]
        if self.peers is not None:
            return self.peers.all_gather(x)
        out = torch.empty((self.shard.size, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out


def reduce_scatter(
    output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup, peers: "PeerMemory | None" = None
) -> None:
    """output = tree sum over ranks of their r-th part of `input`; float32, input [size * n], output [n].

    Each rank receives every rank's part unreduced and adds in tree order, so the result does not depend on the transport:
    the collectives of `group`, or `peers`.
    """
    size = dist.get_world_size(group)
    if {input.dtype, output.dtype} != {torch.float32} or input.numel() != size * output.numel():
        raise TreeError(f"reduce_scatter: {input.dtype} of {input.numel()} into {output.numel()} x {size} ranks")
    if not is_power_of_two(size):
        raise TreeError(f"reduce_scatter over {size} ranks: the world size must be a power of two")
    if size == 1:
        output.copy_(input.view_as(output))
    elif peers is not None:
        peers.reduce_scatter(output, input)
    else:
        parts = torch.empty_like(input, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts.view(-1), input.contiguous().view(-1), group=group)
        output.copy_(_root(parts.view(size, *output.shape), torch.float32))


def _is_nccl(group: dist.ProcessGroup | None) -> bool:
    """Whether `group` moves CUDA tensors by NCCL."""
    return group is not None and "cuda:nccl" in str(dist.get_backend_config(group))


def _root(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The fold of contiguous parts [size, ...], rounded once."""
    if not parts.is_cuda:
        return fold(list(parts), operator.add).to(dtype)
    from kernels.collectives.fold_kernel import fold_rows  # triton, which a machine without a GPU may lack

    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    fold_rows(parts.view(len(parts), -1), out.view(-1))
    return out
