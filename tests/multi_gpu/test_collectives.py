"""Over NCCL and peer memory, one card per rank: the bits of the fold on one rank, eager and in a replayed CUDA graph."""

import pytest
import torch

from tests.collectives.processes import run_ranks

CARDS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(CARDS < 2, reason=f"needs two CUDA devices, has {CARDS}"),
]


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    from tests.multi_gpu.ranks import work

    world = 1 << min(3, CARDS.bit_length() - 1)  # the largest power of two, up to 8
    return run_ranks(world, work, backend="nccl", seconds=240)


@pytest.mark.parametrize("how", ["eager", "replayed"])
@pytest.mark.parametrize("transport", ["nccl", "peers"])
def test_bits_of_the_fold(ranks: list[dict], transport: str, how: str) -> None:
    for report in ranks:
        assert report[transport, how] == []


def test_wrong_use_raises(ranks: list[dict]) -> None:
    for report in ranks:
        errors = report["errors"]
        assert "float32" in errors["bf16 partials"] and "bfloat16" in errors["bf16 partials"]
        assert "cpu" in errors["a CPU tensor"] and "cuda" in errors["a CPU tensor"]
        assert "7" in errors["sizes"] and "3 x" in errors["sizes"]
        assert "float64" in errors["to float64"]
        assert "same group" in errors["another group"]
