"""The trainer's batch, token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.data import Problem
from rl.pack import pack, pack_supervised
from rl.score import Group, Sample
from rollout.sampling import Completion, SamplingParams

tokens = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)
groups_of = st.integers(2, 4).flatmap(
    lambda size: st.lists(st.tuples(tokens, st.lists(tokens, min_size=size, max_size=size)), min_size=1, max_size=4)
)


def groups(shape: list[tuple[tuple[int, ...], list[tuple[int, ...]]]]) -> list[Group]:
    out = []
    for g, (prompt, responses) in enumerate(shape):
        problem = Problem(str(g), "", prompt, "", "", None)
        done = [
            Completion(i, r, tuple(float(np.float32(-0.1 * (g + i + j))) for j in range(len(r))), "stop", 0)
            for i, r in enumerate(responses)
        ]
        samples = tuple(Sample(c, "", 0.0) for c in done)
        out.append(Group(problem, samples, tuple(0.25 * i - g for i in range(len(responses)))))
    return out


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(shape=groups_of)
def test_pack(mean: str, shape: list) -> None:
    gs = groups(shape)
    batch = pack(gs, SamplingParams(9, 0.7, top_k=7, top_p=0.9, min_p=0.05), mean, limit=9)  # type: ignore[arg-type]
    samples = [
        (g.problem.prompt_ids, s.completion, a) for g in gs for s, a in zip(g.samples, g.advantages, strict=True)
    ]
    total = sum(len(c.token_ids) for _, c, _ in samples)
    assert batch.token_ids.tolist() == [t for p, c, _ in samples for t in p + c.token_ids]
    assert batch.lengths.tolist() == [len(p) + len(c.token_ids) for p, c, _ in samples]
    assert batch.token_ids[batch.response_rows()].tolist() == [t for _, c, _ in samples for t in c.token_ids]
    assert batch.logprobs.tolist() == [x for _, c, _ in samples for x in c.logprobs]  # float32 all the way
    assert batch.temperatures.tolist() == [np.float32(0.7)] * total
    assert batch.truncation.rows.tolist() == list(range(total)) and batch.truncation.top_k.tolist() == [7] * total
    assert batch.truncation.top_p.tolist() == [np.float32(0.9)] * total
    assert batch.truncation.min_p.tolist() == [np.float32(0.05)] * total
    assert not len(pack(gs, SamplingParams(9, 0.7), mean, limit=9).truncation)  # type: ignore[arg-type]
    at = 0
    for _, c, advantage in samples:
        n = len(c.token_ids)
        count = {"token": total, "sequence": len(samples) * n, "constant": len(samples) * 9}[mean]
        assert batch.weights[at : at + n].tolist() == [np.float32(1 / count)] * n
        assert batch.advantages[at : at + n].tolist() == [np.float32(advantage)] * n
        at += n
    assert at == total
    if mean != "constant":
        assert batch.weights.sum(dtype=np.float64) == pytest.approx(1, rel=1e-6)
    kinds = {k: getattr(batch, k).dtype for k in ("logprobs", "advantages", "weights", "temperatures")}
    assert set(kinds.values()) == {np.dtype(np.float32)} and batch.token_ids.dtype == np.int64


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6))
def test_pack_supervised(pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    batch = pack_supervised([(Problem("", "", p, "", "", None), s) for p, s in pairs])
    assert batch.token_ids.tolist() == [t for p, s in pairs for t in p + s]
    assert batch.responses.tolist() == [len(s) for _, s in pairs]
    assert batch.token_ids[batch.response_rows()].tolist() == [t for _, s in pairs for t in s]
    assert batch.weights.sum(dtype=np.float64) == pytest.approx(1, rel=1e-6)
    assert set(batch.advantages.tolist()) == set(batch.temperatures.tolist()) == {1.0}
