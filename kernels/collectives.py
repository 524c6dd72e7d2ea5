"""Sums across ranks in tree order. The transport (gloo, NCCL) moves bytes and never adds."""

import operator

import torch
import torch.distributed as dist

from kernels.tree import WHOLE, Shard, TreeError, fold, is_power_of_two


class TreeGroup:
    """The ranks that share one model: rank r holds the r-th subtree of every sum.

    `TreeGroup()` is the whole model on one rank, where each method is the identity (and the one rounding). Invariant to the
    size of the group: a sum over T subtree roots has the bits of the unsharded tree.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.shard = WHOLE if group is None else Shard(dist.get_rank(group), dist.get_world_size(group))

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold these collectives: not those that go through the host, as gloo's do."""
        return self.shard.size == 1

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Tree sum over ranks of float32 `partial` (any shape), rounded once to `dtype`; the same on every rank. On one rank,
        where the partial is the root, it may come in `dtype`."""
        if self.shard.size == 1 and partial.dtype in (torch.float32, dtype):
            return partial.to(dtype)
        if partial.dtype != torch.float32:
            raise TreeError(f"all_reduce takes unrounded float32 roots, got {partial.dtype}")
        return fold(list(self.all_gather(partial)), operator.add).to(dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """[size, *x.shape]: the tensor of every rank, in rank order."""
        if self.shard.size == 1:
            return x[None]
        out = torch.empty((self.shard.size, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out


def reduce_scatter(output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup) -> None:
    """output = tree sum over ranks of their r-th part of `input`; float32, input [size * n], output [n].

    Each rank receives every rank's part unreduced and adds in tree order, so the result does not depend on the transport.
    """
    size = dist.get_world_size(group)
    if input.dtype != torch.float32 or input.numel() != size * output.numel():
        raise TreeError(f"reduce_scatter: {input.dtype} of {input.numel()} into {output.numel()} x {size} ranks")
    if not is_power_of_two(size):
        raise TreeError(f"reduce_scatter over {size} ranks: the world size must be a power of two")
    parts = torch.empty_like(input)
    dist.all_to_all_single(parts, input.contiguous(), group=group)
    output.copy_(fold(list(parts.view(size, -1)), operator.add).view_as(output))
