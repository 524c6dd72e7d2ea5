"""CUDA graphs change no bit of a completion."""

from dataclasses import replace

import pytest
import torch

from rollout.graphs import padded
from tests.model.shapes import SHAPES, random_weights
from tests.rollout.liars import Liar, speculate
from tests.rollout.scenarios import LIMITS, bits, engine, requests

BF16 = {"dtype": torch.bfloat16, "device": "cuda"}


def test_padded_sizes() -> None:
    """Never smaller, never shrinking, few of them, and little waste."""
    sizes = [padded(n) for n in range(1, 513)]
    assert sizes == sorted(sizes) and all(s >= n for n, s in enumerate(sizes, 1))
    assert len(set(sizes)) < 30 and all(s - n < max(8, n / 3) for n, s in enumerate(sizes, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "limits", ["roomy", "pages of 5", "few pages", "chunks of 3", "overlapped", "overlapped, few pages"]
)
def test_graphs_are_the_eager_steps(limits: str) -> None:
    """Batches that grow and shrink, prefill beside decode, preemption; then again, from graphs that exist."""
    config = SHAPES["narrow heads"]
    asked = requests(config)
    some = [
        replace(r, top=r.id % 3 * 4) for r in asked
    ]  # no graph serves a step with one that asks for the most likely tokens
    eager = engine(config, **BF16)
    expected, expected_some = bits(eager.generate(asked)), bits(eager.generate(some))
    captured = engine(config, cuda_graphs=True, **BF16, **LIMITS[limits])
    assert bits(captured.generate(some)) == expected_some
    assert bits(captured.generate(asked)) == expected
    graphs = captured.runner.graphs
    assert graphs is not None and len(graphs.graphs) > 1
    assert bits(captured.generate(some)) == expected_some
    assert bits(captured.generate(asked)) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weights_are_replaced_under_captured_graphs() -> None:
    config = SHAPES["narrow heads"]
    asked = requests(config)
    captured = engine(config, cuda_graphs=True, **BF16)
    captured.generate(asked)
    captured.load(random_weights(config, 3), 7)
    assert bits(captured.generate(asked)) == bits(engine(config, 3, **BF16).generate(asked))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("lie", ["right", "half", "too long", "random"])
@pytest.mark.parametrize("limits", ["roomy", "few pages", "overlapped", "overlapped, few pages"])
def test_drafted_tokens_are_rows_of_the_same_graphs(limits: str, lie: str) -> None:
    config = SHAPES["narrow heads"]
    asked = requests(config)
    truth = engine(config, **BF16).generate(asked)
    captured = engine(config, cuda_graphs=True, speculate="auto", **BF16, **LIMITS[limits])
    speculate(captured, Liar(lie, config.vocab_size, truth), reach=9)
    for _ in range(2):
        assert bits(captured.generate(asked)) == bits(truth)
        captured.forget()
        assert captured.pool.available == captured.pool.pages
    assert captured.runner.graphs is not None and max(rows for rows, _, _ in captured.runner.graphs.graphs) > 10
    counts = captured.drafts
    assert counts.drafted > 20 and (lie == "random" or counts.accepted > counts.drafted / 8)
