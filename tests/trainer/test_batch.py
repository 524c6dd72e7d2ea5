"""Batches are cut, counted and reported as the words say."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.shapes import TINY
from tests.trainer.batches import random_batch
from trainer.batch import COLUMNS, Batch, BatchError, StepReport, check_batch_arithmetic, cut_by_tokens

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


@PROPERTY
@given(st.integers(1, 8), st.integers(0, 100), st.data())
def test_take_cuts_every_field(count: int, seed: int, data: st.DataObject) -> None:
    batch = random_batch(TINY, count, seed)
    total = len(batch.logprobs)
    columns = {name: np.arange(total).astype(dtype) for name, (dtype, _) in COLUMNS.items()}
    batch = replace(batch, **columns)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    edges = [0, *cuts, count]
    parts = [batch.take(a, b) for a, b in pairwise(edges)]
    for name, whole in vars(batch).items():
        pieces = [getattr(part, name) for part in parts]
        if name == "rows":  # counted from each part's own first token
            starts = np.cumsum([0, *(len(part.token_ids) for part in parts)])
            pieces = [piece + start for piece, start in zip(pieces, starts, strict=False)]
        joined = np.concatenate(pieces)
        assert joined.dtype == whole.dtype and joined.tobytes() == whole.tobytes(), name
    assert [part.sequences for part in parts] == np.diff(edges).tolist()
    for part in parts:
        assert len(part.token_ids) == part.lengths.sum() and len(part.logprobs) == part.counts.sum()


@PROPERTY
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6))
def test_rows_know_their_sequence_and_place(chosen: list[list[bool]]) -> None:
    """Any tokens but the first of a sequence, in any number of stretches, or none."""
    places = [(i, place) for i, one in enumerate(chosen) for place, row in enumerate(one) if row and place]
    lengths = np.array([len(one) for one in chosen])
    starts = np.cumsum(lengths) - lengths
    rows = np.array([starts[i] + place for i, place in places], dtype=np.int64)
    batch = Batch.of(np.arange(lengths.sum()), lengths, rows)
    assert list(zip(batch.sequence.tolist(), batch.positions.tolist(), strict=True)) == places
    assert batch.counts.tolist() == [sum(one[1:]) for one in chosen]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([1, 3], "token 3 is the first of its sequence"),
        ([0], "token 0 is the first"),
        ([2, 1], "must ascend"),
        ([1, 1], "must ascend"),
        ([5], r"within 0 \.\. 4"),
    ],
)
def test_rows_that_nothing_predicts_are_refused(rows: list[int], reason: str) -> None:
    with pytest.raises(BatchError, match=reason):
        Batch.of(np.arange(5), np.array([3, 2]), np.array(rows))


def test_columns_of_another_length_are_refused() -> None:
    with pytest.raises(BatchError, match=r"2 loss rows and \{'top_k': 3\}"):
        Batch.of(np.arange(5), np.array([3, 2]), np.array([1, 4]), top_k=np.zeros(3, np.int64))
    with pytest.raises(BatchError, match="lengths of 4 tokens in all for 5 token ids"):
        Batch.of(np.arange(5), np.array([3, 1]), np.array([1]))


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
    counts = np.array(data.draw(st.lists(st.integers(0, 4), min_size=total, max_size=total)))
    logprobs = np.arange(counts.sum(), dtype=np.float32)
    ends = np.cumsum(counts)
    pieces = [logprobs[e - n : e] for e, n in zip(ends, counts, strict=True)]
    clipped = data.draw(st.lists(st.integers(0, 3), min_size=world, max_size=world))
    parts = []
    for rank in range(world):
        mine = np.concatenate([np.arange(size) + (i * world + rank) * size for i in range(rounds)])
        values = np.concatenate([pieces[i] for i in mine])
        parts.append(StepReport(values, mine, counts[mine], float(rank + 1), clipped[rank], 2.5, 9, rank, 7))
    merged = StepReport.merge(parts)
    assert merged.logprobs.tobytes() == logprobs.tobytes() and merged.logprobs.dtype == np.float32
    assert merged.sequences.tolist() == list(range(total)) and merged.counts.tolist() == counts.tolist()
    assert merged.loss == sum(range(world + 1)) and (merged.grad_norm, merged.step) == (2.5, 9)
    assert (merged.clipped, merged.clip_fraction) == (sum(clipped), sum(clipped) / max(1, len(logprobs)))
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
