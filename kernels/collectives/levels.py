"""Sums over ranks on several hosts: inside each host first, then between hosts, which are the next levels of the same tree.

So an adapter carries the sum of its host's ranks and not what each of them had: 1 / (ranks of a host) of the bytes.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from kernels.collectives.group import hosts_of, peer_memory
from kernels.collectives.rendezvous import patience
from kernels.collectives.transport import Collectives, Transport
from kernels.tree import Shard


def by_levels(group: dist.ProcessGroup) -> Transport | None:
    """Chooses what moves bytes between the ranks of `group` as of `TreeGroup`: peer memory where they are on one host and it
    serves, levels where several ranks of a host are a subtree, None where the collectives of the group are as good. A
    collective. No bit depends on it."""
    if dist.get_world_size(group) == 1:
        return None
    hosts = hosts_of(group)
    block = together(hosts)
    if block == len(hosts):
        return peer_memory(group)
    return Levels(group, block) if block > 1 else None


def together(hosts: Sequence[str]) -> int:
    """Returns how many consecutive ranks are on one host, the most that is so for every aligned block: a power of two."""
    block = len(hosts)
    while any(len(set(hosts[i : i + block])) > 1 for i in range(0, len(hosts), block)):
        block //= 2
    return block


def subgroup(ranks: Sequence[int]) -> dist.ProcessGroup:
    """Makes a group of some ranks (numbers of the default group), which alone call this."""
    made = dist.new_group(list(ranks), timeout=patience(), use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    return made


class Levels:
    """Moves bytes between `nodes` x `block` ranks, of which `block` consecutive ones are on one host."""

    def __init__(self, group: dist.ProcessGroup, block: int) -> None:
        """A collective."""
        ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        self.shard = Shard(rank, len(ranks))
        self._nodes, self._block = len(ranks) // block, block
        first = rank // block * block
        inner, outer = subgroup(ranks[first : first + block]), subgroup(ranks[rank % block :: block])
        self._inside: Transport = peer_memory(inner) or Collectives(inner)
        self._between: Transport = Collectives(outer)
        self.capturable = self._inside.capturable and self._between.capturable

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Adds inside a host in float32, then between hosts, rounded once to `dtype`."""
        return self._between.all_reduce(self._inside.all_reduce(partial, torch.float32), dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tensor of every rank, [size, *x.shape], in rank order."""
        return self._between.all_gather(self._inside.all_gather(x)).flatten(0, 1)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Gives each rank of a host, of the host's sum, the parts of the ranks of its number on all hosts; these are then added
        between hosts. Both float32."""
        parts = input.reshape(self._nodes, self._block, -1).transpose(0, 1).contiguous()
        sums = torch.empty_like(parts[0])
        self._inside.reduce_scatter(sums.view(-1), parts.view(-1))
        self._between.reduce_scatter(output, sums.view(-1))
