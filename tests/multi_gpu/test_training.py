"""FSDP2 over NCCL, its reduce-scatter in peer memory beside the backward pass: the weights of one rank."""

import pytest
import torch

from tests.collectives.processes import run_ranks

CARDS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(CARDS < 2, reason=f"needs two CUDA devices, has {CARDS}"),
]


def test_world_size_changes_no_bit() -> None:
    from tests.multi_gpu.training import work

    (alone,) = run_ranks(1, work, backend="nccl", seconds=240)
    assert len(set(alone[1])) == 3
    for world in (2, 4, 8):
        if world <= CARDS:
            assert run_ranks(world, work, backend="nccl", seconds=240) == [alone] * world
