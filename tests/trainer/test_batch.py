"""Batches are cut, counted and reported as the words say."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.shapes import TINY
from tests.trainer.batches import random_batch
from trainer.batch import Batch, BatchError, StepReport, check_batch_arithmetic

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


@PROPERTY
@given(st.integers(1, 8), st.integers(0, 100), st.data())
def test_take_cuts_every_field(count: int, seed: int, data: st.DataObject) -> None:
    batch = random_batch(TINY, count, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=3)))
    edges = [0, *cuts, count]
    parts = [batch.take(a, b) for a, b in pairwise(edges)]
    for name, whole in vars(batch).items():
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert joined.dtype == whole.dtype and joined.tobytes() == whole.tobytes(), name
    assert [part.sequences for part in parts] == np.diff(edges).tolist()
    for part in parts:
        assert len(part.token_ids) == part.lengths.sum() and len(part.logprobs) == part.responses.sum()


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
        parts.append(StepReport(values, mine, responses[mine], float(rank + 1), clipped[rank] / len(values), 2.5, 9))
    merged = StepReport.merge(parts)
    assert merged.logprobs.tobytes() == logprobs.tobytes() and merged.logprobs.dtype == np.float32
    assert merged.sequences.tolist() == list(range(total)) and merged.responses.tolist() == responses.tolist()
    assert merged.loss == sum(range(world + 1)) and (merged.grad_norm, merged.step) == (2.5, 9)
    assert merged.clip_fraction == pytest.approx(sum(clipped) / len(logprobs))
    alone = StepReport.merge([replace(merged, loss=1.0)])
    assert alone.logprobs.tobytes() == logprobs.tobytes()
