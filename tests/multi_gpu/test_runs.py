"""Whole runs over NCCL and peer memory: TP and FSDP over all cards, one card, a kill; one hash, the one that is recorded."""

import pytest
import torch

from rl.prove import BY_TOKENS, SMALL, Layout, Row, against, budget_of, check, prove
from tests.rl.recorded import assert_recorded

CARDS = 1 << min(2, torch.cuda.device_count().bit_length() - 1) if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(CARDS < 2, reason=f"needs two CUDA devices, has {CARDS}"),
]
HALF = CARDS // 2
LAYOUTS = {
    "one card each": Layout("bfloat16", 1, 4, "none", "none", 1, 1, "split", False),
    "trainer on all": Layout("bfloat16", CARDS, 2, "layer", "none", 1, 1, "colocated", False),
    "sampler on all": Layout("bfloat16", 1, BY_TOKENS, "none", "none", CARDS, 1, "colocated", False),
    "both on all, killed before": Layout("bfloat16", CARDS, 1, "selective", "optimizer", CARDS, 1, "colocated", True),
    "half of them each": Layout("bfloat16", HALF, 1, "none", "none", HALF, 1, "split", False),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """Three steps each, after a warm start of two."""
    small = ["device=cuda"]
    budget = budget_of(check([*SMALL, *small])[0])
    found = prove(list(LAYOUTS.values()), small, tmp_path_factory.mktemp("runs"), budget)
    return dict(zip(LAYOUTS, found, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_sampler_trainer_and_one_card_agree(name: str, rows: dict[str, Row]) -> None:
    row = rows[name]
    assert row.error == "" and row.differing == 0 and row.compared > 400
    assert row.sha256 == rows["one card each"].sha256


def test_the_hash_is_the_recorded_one(rows: dict[str, Row]) -> None:
    assert against(list(rows.values())) == ""
    assert_recorded("cuda", "bfloat16", rows["one card each"].sha256)
