"""Batches are cut, counted and reported as the words say."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops import Truncation
from tests.model.shapes import TINY
from tests.trainer.batches import random_batch
from trainer.batch import Batch, BatchError, StepReport, check_batch_arithmetic, cut_by_tokens

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


@PROPERTY
@given(st.integers(1, 8), st.integers(0, 100), st.data())
def test_take_cuts_every_field(count: int, seed: int, data: st.DataObject) -> None:
    batch = random_batch(TINY, count, seed)
    total = len(batch.logprobs)
    rows = torch.tensor(sorted(data.draw(st.sets(st.integers(0, total - 1)))), dtype=torch.int64)
    batch = replace(batch, truncation=Truncation(rows, rows + 1, rows / total, rows / 2 / total))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    edges = [0, *cuts, count]
    parts = [batch.take(a, b) for a, b in pairwise(edges)]
    for name, whole in vars(batch).items():
        if name == "truncation":
            continue
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert joined.dtype == whole.dtype and joined.tobytes() == whole.tobytes(), name
    assert [part.sequences for part in parts] == np.diff(edges).tolist()
    for part in parts:
        assert len(part.token_ids) == part.lengths.sum() and len(part.logprobs) == part.responses.sum()
    starts = np.cumsum([0, *(len(part.logprobs) for part in parts)])
    cut = [replace(p.truncation, rows=p.truncation.rows + int(s)) for p, s in zip(parts, starts, strict=False)]
    for name, whole in vars(batch.truncation).items():
        assert torch.equal(torch.cat([getattr(c, name) for c in cut]), whole), name


@PROPERTY
@given(st.lists(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), min_size=1))
def test_response_rows_are_the_last_tokens_of_each_sequence(shape: list[tuple[int, int]]) -> None:
    lengths, responses = (np.array(column) for column in zip(*shape, strict=True))
    zeros = np.zeros(int(responses.sum()), np.float32)
    batch = Batch(np.arange(lengths.sum()), lengths, responses, zeros, zeros, zeros, zeros)
    expected, start = [], 0
    for n, r in shape:
        expected += range(start + n - r, start + n)
        start += n
    assert batch.response_rows().tolist() == expected


@PROPERTY
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(1, 6))
def test_the_formula(micro: int, world: int, leaf: int, micro_batches: int) -> None:
    sequences = leaf * micro * world * micro_batches
    assert check_batch_arithmetic(sequences, leaf, micro, world) == micro_batches
    if leaf * micro * world > 1:
        with pytest.raises(
            BatchError, match=f"{sequences + 1} sequences a step are no multiple of .* = {leaf * micro * world}$"
        ):
            check_batch_arithmetic(sequences + 1, leaf, micro, world)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((12, 1, 3, 1), "trainer.micro_leaves=3 must be a power of two"),
        ((12, 1, 0, 1), "trainer.micro_leaves=0 must be a power of two"),
        ((12, 1, -2, 1), "trainer.micro_leaves=-2 must be a power of two"),
        ((12, 1, 1, 6), "trainer.world_size=6 must be a power of two"),
        ((0, 1, 1, 1), "0 sequences a step are no multiple"),
        ((4, 2, 2, 2), "trainer.leaf_sequences=2 * trainer.micro_leaves=2 * trainer.world_size=2 = 8"),
    ],
    ids=str,
)
def test_what_does_not_fit(numbers: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(BatchError) as error:
        check_batch_arithmetic(*numbers)
    assert message in str(error.value) and "\n" not in str(error.value)


@PROPERTY
@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.data())
def test_merge_puts_every_log_prob_back_in_its_place(world: int, size: int, rounds: int, data: st.DataObject) -> None:
    """Ranks take turns: micro-batch i of rank r holds sequences (i * world + r) * size and on."""
    total = world * size * rounds
    responses = np.array(data.draw(st.lists(st.integers(1, 4), min_size=total, max_size=total)))
    logprobs = np.arange(responses.sum(), dtype=np.float32)
    ends = np.cumsum(responses)
    pieces = [logprobs[e - n : e] for e, n in zip(ends, responses, strict=True)]
    clipped = data.draw(st.lists(st.integers(0, 3), min_size=world, max_size=world))
    parts = []
    for rank in range(world):
        mine = np.concatenate([np.arange(size) + (i * world + rank) * size for i in range(rounds)])
        values = np.concatenate([pieces[i] for i in mine])
        parts.append(
            StepReport(values, mine, responses[mine], float(rank + 1), clipped[rank] / len(values), 2.5, 9, rank, 7)
        )
    merged = StepReport.merge(parts)
    assert merged.logprobs.tobytes() == logprobs.tobytes() and merged.logprobs.dtype == np.float32
    assert merged.sequences.tolist() == list(range(total)) and merged.responses.tolist() == responses.tolist()
    assert merged.loss == sum(range(world + 1)) and (merged.grad_norm, merged.step) == (2.5, 9)
    assert merged.clip_fraction == pytest.approx(sum(clipped) / len(logprobs))
    alone = StepReport.merge([replace(merged, loss=1.0)])
    assert alone.logprobs.tobytes() == logprobs.tobytes()


@PROPERTY
@given(st.integers(0, 2), st.integers(1, 3), st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 200))
def test_a_token_budget_cuts_aligned_subtrees(power: int, leaf: int, tokens: list[int], more: int) -> None:
    """Whole, in order, no rank's part above the budget, and none that its neighbour's could have been joined to."""
    world = 1 << power
    lengths = np.resize(tokens, -(-len(tokens) // (leaf * world)) * leaf * world)
    leaves = lengths.reshape(-1, leaf).sum(1)
    budget = int(leaves.max()) + more
    parts = cut_by_tokens(lengths, leaf, world, budget)
    assert [p.first for p in parts] == np.cumsum([0, *(p.leaves * world for p in parts)])[:-1].tolist()
    assert parts[-1].first + parts[-1].leaves * world == len(leaves)
    for part in parts:
        assert part.leaves & (part.leaves - 1) == 0 and part.first % (part.leaves * world) == 0
        sums = [lengths[slice(*part.sequences(rank, leaf))].sum() for rank in range(world)]
        assert max(sums) <= budget and sum(sums) == leaves[part.first : part.first + part.leaves * world].sum()
        assert 1 << part.level(world) == part.leaves * world
    for a, b in pairwise(parts):
        if a.leaves == b.leaves and a.first % (2 * a.leaves * world) == 0:
            both = leaves[a.first : b.first + b.leaves * world].reshape(world, -1).sum(1)
            assert both.max() > budget


def test_a_leaf_above_the_budget_is_an_error_with_both_numbers() -> None:
    lengths = np.array([3, 4, 20, 13, 1, 1, 1, 1])
    assert len(cut_by_tokens(lengths, 2, 2, 33)) == 2
    with pytest.raises(BatchError, match=r"leaf 1 has 33 tokens \(2 sequences\) and trainer.micro_tokens is 32"):
        cut_by_tokens(lengths, 2, 2, 32)
    with pytest.raises(BatchError, match="8 sequences a step are no multiple of"):
        cut_by_tokens(lengths, 3, 1, 100)
