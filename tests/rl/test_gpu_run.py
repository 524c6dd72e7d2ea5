"""The main job on a GPU: one override, the Triton kernels, and one hash for tensor-parallel sizes and worlds."""

import json
from pathlib import Path

import pytest
import torch

from tests.rl.command import SHORT, command

pytestmark = pytest.mark.gpu


def run(folder: Path, *more: str) -> dict:
    with command("device=cuda", *SHORT, f"out_dir={folder}", *more, cwd=folder.parent) as running:
        outcome = running.finish(timeout=240)
        assert outcome.code == 0, outcome
        running.assert_nothing_left()
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_main_job_is_one_hash(tmp_path: Path) -> None:
    """TP 1 and 2, and another world size, batch and cache; ranks share one card where there is no other."""
    one = run(tmp_path / "one", "rollout.tp=1")
    two = run(tmp_path / "two", "rollout.tp=2", "trainer.world_size=1", "trainer.micro_leaves=1", "rollout.page_size=3")
    assert one["tokens_compared"] == two["tokens_compared"] > 256
    assert one["tokens_nonzero"] == two["tokens_nonzero"] == 0
    assert one["weights_sha256"] == two["weights_sha256"]
    for summary in (one, two):
        assert summary["device"] == "cuda" and "triton" in summary["versions"]
