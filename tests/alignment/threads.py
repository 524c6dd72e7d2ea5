"""Ranks of one tensor-parallel group as threads of one process that share one device."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from kernels.collectives import TreeGroup
from kernels.collectives.transport import fold_parts
from kernels.tree import Shard

PATIENCE = 300.0  # seconds that a rank waits for the others, compilations included


class Company:
    """What `size` ranks share: a baton, so that one of them runs at a time (a stream has one order of launches, and a compiler
    one caller), and the parts of the collective they are in."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.baton = threading.Lock()
        self.parts: list[torch.Tensor] = [torch.empty(0)] * size
        self.gathered = torch.empty(0)
        self.barrier = threading.Barrier(size, self._gather, PATIENCE)

    def _gather(self) -> None:
        self.gathered = torch.stack(self.parts)

    def exchange(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        self.parts[rank] = x
        self.baton.release()
        try:
            self.barrier.wait()
        finally:
            self.baton.acquire()
        return self.gathered.clone()


class Threads:
    """A transport without a process group. It moves bytes and never adds: the sum over ranks is that of every other one."""

    capturable = False

    def __init__(self, company: Company, rank: int) -> None:
        self.company, self.shard = company, Shard(rank, company.size)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.company.exchange(self.shard.rank, x)

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return fold_parts(self.all_gather(partial), dtype)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> None:
        parts = self.all_gather(input.view(self.shard.size, *output.shape))[:, self.shard.rank]
        output.copy_(fold_parts(parts.contiguous(), torch.float32))


def run_threads(size: int, work: Callable[[TreeGroup], Any]) -> list[Any]:
    """What `work(group)` returns on each of `size` ranks; the first error of any of them is raised."""
    company, results, errors = Company(size), [None] * size, []

    def rank(r: int) -> None:
        with company.baton:
            try:
                results[r] = work(TreeGroup(transport=Threads(company, r)))
            except threading.BrokenBarrierError:  # another rank failed and says why
                pass
            except BaseException as error:
                errors.append(error)
                company.barrier.abort()

    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
