"""What one tensor-parallel rank of the tests serves."""

import torch.distributed as dist

from kernels.collectives import TreeGroup
from kernels.model import ModelConfig
from rollout.sampling import Completion
from tests.alignment.scenes import SMALL, engine, requests, weights


def serve(config: ModelConfig, device: str, group: TreeGroup) -> list[Completion]:
    """Two at a time, so that the second's prompt arrives in chunks beside the first one's decoding."""
    served = engine(config, weights(config, device), device, group, running=2, chunk=300)
    return served.generate(requests(config))


def work(device: str) -> list[Completion]:
    assert dist.group.WORLD is not None
    return serve(SMALL, device, TreeGroup(dist.group.WORLD))
