"""The trainer's batch, token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.data import Problem
from rl.pack import pack, pack_supervised
from rl.samples import Transcript, sampled_counts
from rollout.sampling import Completion, SamplingParams
from trainer.batch import COLUMNS, BatchError

tokens = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)
params = st.builds(
    SamplingParams,
    st.just(9),
    st.sampled_from([0.0, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 7]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    ids = draw(tokens)
    logprobs = draw(st.lists(st.floats(-9, 0, width=32), min_size=len(ids), max_size=len(ids)))
    versions = draw(st.just(()) | st.lists(st.integers(0, 3), min_size=len(ids), max_size=len(ids)).map(tuple))
    return Completion(0, ids, tuple(logprobs), "stop", 5, draw(params), versions=versions)


pieces = st.lists(tokens | completions(), max_size=5)
transcripts = st.lists(st.builds(lambda first, rest: (first, *rest), tokens, pieces), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(transcripts)
def test_every_sampled_token_is_a_row_as_its_completion_has_it(given: list[Transcript]) -> None:
    """Any number of stretches in a sequence; none of them has anything from another."""
    done = [piece for t in given for piece in t if isinstance(piece, Completion)]
    count = sum(len(c.token_ids) for c in done)
    advantages, weights = np.arange(2 * count, dtype=np.float32).reshape(2, count)
    batch = pack(given, advantages, weights)
    texts = [
        [t for piece in one for t in (piece.token_ids if isinstance(piece, Completion) else piece)] for one in given
    ]
    assert batch.token_ids.tolist() == [t for text in texts for t in text]
    assert batch.lengths.tolist() == [len(text) for text in texts]
    assert batch.token_ids[batch.rows].tolist() == [t for c in done for t in c.token_ids]
    assert batch.counts.tolist() == sampled_counts(given).tolist()
    assert batch.logprobs.tolist() == [x for c in done for x in c.logprobs]  # float32 all the way
    assert batch.advantages.tolist() == advantages.tolist() and batch.weights.tolist() == weights.tolist()
    drawn = [c for c in done for _ in c.token_ids]
    assert batch.temperatures.tolist() == [np.float32(c.sampling.temperature or 1) for c in drawn]
    cut = [
        (0, 1.0, 0.0) if c.sampling.greedy else (c.sampling.top_k, c.sampling.top_p, c.sampling.min_p) for c in drawn
    ]
    assert batch.top_k.tolist() == [k for k, _, _ in cut]
    assert batch.top_p.tolist() == [np.float32(p) for _, p, _ in cut]
    assert batch.min_p.tolist() == [np.float32(m) for _, _, m in cut]
    assert batch.versions.tolist() == [v for c in done for v in (c.versions or [5] * len(c.token_ids))]
    assert {name: getattr(batch, name).dtype for name in COLUMNS} == {n: np.dtype(t) for n, (t, _) in COLUMNS.items()}


def test_a_completion_that_nothing_precedes_is_refused() -> None:
    with pytest.raises(BatchError, match="token 0 is the first of its sequence"):
        pack([(Completion(0, (3, 4), (0.0, 0.0), "stop", 0, SamplingParams(2)),)], *np.ones((2, 2), np.float32))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6))
def test_pack_supervised(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    batch = pack_supervised([(Problem("", "", p, "", "", None), s) for p, s in pairs])
    assert batch.token_ids.tolist() == [t for p, s in pairs for t in p + s]
    assert batch.counts.tolist() == [len(s) for _, s in pairs]
    assert batch.token_ids[batch.rows].tolist() == [t for _, s in pairs for t in s]
    assert batch.weights.sum(dtype=np.float64) == pytest.approx(1, rel=1e-6)
    assert set(batch.advantages.tolist()) == set(batch.temperatures.tolist()) == {1.0}
    assert set(batch.versions.tolist()) == {-1} and not batch.top_k.any()
