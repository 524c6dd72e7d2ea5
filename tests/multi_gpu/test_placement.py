"""The same run with rollout and trainer on the same cards, which they hand to each other, and on cards of their own."""

from pathlib import Path

import pytest
import torch

from tests.rl.test_gpu_run import run

CARDS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(CARDS < 2, reason=f"needs two CUDA devices, has {CARDS}"),
]


def test_colocated_and_split_are_one_run(tmp_path: Path) -> None:
    """Published over CUDA IPC and NCCL together, and over NCCL alone."""
    colocated = run(tmp_path / "colocated", "rollout.tp=2", "trainer.world_size=2")
    split = run(tmp_path / "split", "rollout.tp=1", "trainer.world_size=1", "cluster.placement=split")
    assert colocated["tokens_nonzero"] == split["tokens_nonzero"] == 0 < colocated["tokens_compared"]
    assert colocated["weights_sha256"] == split["weights_sha256"]
