"""What moves bytes between the ranks of a group: the protocol, and its form over a process group of torch (gloo, NCCL).

A transport may add, but in no other order than the tree: `Collectives` gathers and folds, `kernels.collectives.peers` does both
in one kernel.
"""

import operator
from typing import Protocol

import torch
import torch.distributed as dist

from kernels.tree import WHOLE, Shard, fold

SAVING = 1 << 20
"""Bytes that a rank must save for a sum by slices to be worth two messages instead of one."""


class Transport(Protocol):
    """Moves tensors between the ranks of one group. Every rank calls the same methods in the same order.

    `shard`: this rank and the number of ranks. `capturable`: whether a CUDA graph can hold the calls."""

    shard: Shard
    capturable: bool

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Sums float32 `partial` (any shape) over ranks on the tree, rounded once to `dtype`; the same on every rank."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tensor of every rank, [size, *x.shape], in rank order."""

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Writes into output [n] the tree sum over ranks of their r-th part of input [size * n]; both float32."""


def worth_slicing(n: int, size: int) -> bool:
    """Says whether a rank should add its slice of n elements alone. Gathering everything receives 4 (size - 1) bytes an
    element; exchanging float32 slices, then slices rounded to 2 bytes, 6 (size - 1) / size."""
    return n * (size - 1) * (4 * size - 6) // size > SAVING


def fold_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Adds contiguous float32 parts [size, ...] in tree order, rounded once to `dtype`."""
    if not parts.is_cuda:
        return fold(list(parts), operator.add).to(dtype)
    from kernels.collectives.fold_kernel import fold_rows  # triton, which a machine without a GPU may lack

    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    fold_rows(parts.view(len(parts), -1), out.view(-1))
    return out


def is_nccl(group: dist.ProcessGroup) -> bool:
    """Says whether `group` moves CUDA tensors by NCCL."""
    return "cuda:nccl" in str(dist.get_backend_config(group))


class Alone:
    """Serves one rank: nothing moves."""

    shard = WHOLE
    capturable = True

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rounds the partial, which is the root."""
        return partial.to(dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x[None]."""
        return x[None]

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Copies the input."""
        output.copy_(input.view_as(output))


class Collectives:
    """Moves bytes by the collectives of a process group: gloo on the CPU, or for several ranks on one card; NCCL for one rank
    per card."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.shard = Shard(dist.get_rank(group), dist.get_world_size(group))
        self._nccl = is_nccl(group)
        self.capturable = self._nccl  # gloo's go through the host

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Gathers and folds; what is large over NCCL by slices."""
        if worth_slicing(partial.numel(), self.shard.size) and partial.is_cuda and self._nccl:
            return self._exchange_slices(partial, dtype)
        return fold_parts(self.all_gather(partial), dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tensor of every rank, [size, *x.shape], in rank order."""
        out = torch.empty((self.shard.size, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Receives every rank's part unreduced, and folds."""
        parts = torch.empty_like(input, memory_format=torch.contiguous_format)
        dist.all_to_all_single(parts.view(-1), input.contiguous().view(-1), group=self.group)
        output.copy_(fold_parts(parts.view(self.shard.size, *output.shape), torch.float32))

    def _exchange_slices(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Gives rank r the r-th slice of everyone, which it adds and rounds; the rounded slices are gathered."""
        rank, size = self.shard.rank, self.shard.size
        n = partial.numel()
        slice_ = -(-n // (16 * size)) * 16  # the last ones may be shorter, or empty
        lengths = [max(0, min(n - r * slice_, slice_)) for r in range(size)]
        parts = partial.new_empty(size, lengths[rank])
        dist.all_to_all_single(
            parts.view(-1), partial.contiguous().view(-1), [lengths[rank]] * size, lengths, group=self.group
        )
        rounded = parts.new_empty(slice_, dtype=dtype)
        rounded[: lengths[rank]] = fold_parts(parts, dtype)
        out = rounded.new_empty(size * slice_)
        dist.all_gather_into_tensor(out, rounded, group=self.group)
        return out[:n].view(partial.shape)
