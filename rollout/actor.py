"""The Ray actor of one rollout rank: a process, its rendezvous, and an engine."""

from collections.abc import Sequence
from datetime import timedelta

import ray
import torch
import torch.distributed as dist

from kernels.collectives import TreeGroup, backend_of, peer_memory
from kernels.model import ModelConfig
from kernels.model.weights import Leaves, parameters
from rollout.engine import Engine, EngineConfig
from rollout.sampling import Completion, Request


class RolloutRank:
    """Rank `rank` of one tensor-parallel engine. The driver calls every rank of an engine with the same arguments."""

    def __init__(
        self, rank: int, size: int, store: str, threads: int, model: ModelConfig, config: EngineConfig, card: int
    ) -> None:
        """`card`: the GPU to use, modulo the number there are: ranks share them where there are too few."""
        torch.set_num_threads(threads)
        if config.device == "cuda":
            torch.cuda.set_device(card % torch.cuda.device_count())
        group = TreeGroup()
        if size > 1:
            backend = backend_of(config.device, size)
            dist.init_process_group(
                backend, init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120)
            )
            assert dist.group.WORLD is not None
            group = TreeGroup(dist.group.WORLD, peer_memory(dist.group.WORLD) if backend == "nccl" else None)
        self.model = model
        self.engine = Engine(model, config, group)

    def load(self, weights: dict[str, "ray.ObjectRef"], version: int) -> Leaves:
        """Fetches the bits of every parameter from the object store, one at a time, and keeps this shard's part."""
        dtype = self.engine.config.dtype
        whole = ((p, torch.from_numpy(ray.get(weights[p.name])).view(dtype)) for p in parameters(self.model))
        return self.engine.load(whole, version)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return self.engine.generate(requests)
