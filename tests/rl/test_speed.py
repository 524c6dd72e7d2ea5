"""Arithmetic and tokens of a step, counted by hand."""

import numpy as np
import pytest

from kernels.model import costs
from rl.speed import PEAK_FLOPS, Drafting, speeds
from rollout.drafts.speculation import Counts
from tests.model.shapes import SHAPES
from tests.trainer.batches import random_batch
from trainer.batch import Batch


@pytest.mark.parametrize("name", ["tiny", "tied"])
def test_flops_are_those_of_the_products(name: str) -> None:
    """Each matrix in turn: 2 FLOP a multiply-add, three products (forward, to the input, to the weight)."""
    config, batch = SHAPES[name], random_batch(SHAPES[name], 3)
    H, I, D = config.hidden_size, config.intermediate_size, config.head_dim
    matrices = H * D * (2 * config.heads + 2 * config.kv_heads) + 3 * H * I
    products = 6 * len(batch.token_ids) * (config.layers * matrices + config.vocab_size * H)
    scores = sum(6 * config.layers * config.heads * D * int(n) ** 2 for n in batch.lengths)
    vectors = costs.training_flops(config, batch.lengths) - products - scores
    assert 0 < vectors / products < 0.02  # norms and biases are counted as parameters


SECONDS = {"time/sample": 2.0, "time/train": 0.5, "time/step": 4.0}


def test_drafts_of_a_step_are_what_is_new() -> None:
    counts = [Counts(10, 5, 4, 8, 13, 0.5), Counts(10, 5, 4, 8, 13, 0.5), Counts(30, 20, 8, 16, 36, 2.0)]
    drafting = Drafting(lambda: counts.pop(0))
    names = [f"speed/{n}" for n in ("drafted_tokens", "drafts_accepted_frac", "drafted_step_tokens", "drafts_saved_s")]
    assert drafting() == dict(zip(names, (10, 0.5, 13 / 8, 0.5), strict=True))
    assert drafting() == dict(zip(names, (0, 0.0, 1.0, 0.0), strict=True))
    assert drafting() == dict(zip(names, (20, 0.75, 23 / 8, 1.5), strict=True))


def test_counts_of_two_engines_add_up() -> None:
    one, other = Counts(1, 2, 3, 4, 5, 6.0, {"own": 1, "sibling": 4}), Counts(10, 20, 30, 40, 50, 60.0, {"own": 2})
    assert one.plus(other) == other.plus(one) == Counts(11, 22, 33, 44, 55, 66.0, {"own": 3, "sibling": 4})


def test_speeds() -> None:
    config, n = SHAPES["tiny"], np.array([10, 20])
    batch = Batch.of(np.zeros(30, np.int64), n, np.array([2, 3, 4, 9, 11, 12, 13, 28, 29]))
    got = speeds(config, batch, SECONDS, epochs=1, ranks=2, on_gpu=True)
    assert (got["speed/sample_tokens_per_s"], got["speed/train_tokens_per_s"]) == (4.5, 60.0)
    assert got["speed/step_tokens_per_s"] == 30 / 4.0
    assert got["speed/train_tflops_per_rank"] == pytest.approx(costs.training_flops(config, batch.lengths) / 1e12)
    assert got["speed/train_mfu"] == pytest.approx(costs.training_flops(config, batch.lengths) / PEAK_FLOPS)
    twice = speeds(config, batch, SECONDS, epochs=2, ranks=2, on_gpu=True)
    doubled = {name for name, value in got.items() if twice[name] == 2 * value}
    assert doubled == {"speed/train_tokens_per_s", "speed/train_tflops_per_rank", "speed/train_mfu"}
    assert "speed/train_mfu" not in speeds(config, batch, SECONDS, 1, 2, on_gpu=False)
