"""The divergence metrics: bits decide, formulas are those of float64, and odd values neither crash nor hide."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rl.dynamic_sampling import Drawn
from rl.evaluation import measure
from rl.metrics import FORMULAS, Mismatch, differs, divergence, first_mismatch
from rl.samples import Group, Sample
from rl.updates import measure as updates
from tests.rl.documented import documented, undocumented
from trainer.routing import RoutingReport

any_bits = hnp.arrays(np.uint32, st.integers(1, 40))  # every float32 there is: NaNs, infinities, subnormals


def float32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@given(any_bits)
def test_equal_bits_are_ideal_whatever_the_values(patterns):
    values = patterns.view(np.float32)
    metrics = divergence(values, values.copy(), np.zeros(len(values), np.int64))
    assert {k: metrics[k] for k in FORMULAS} == {k: ideal for k, (_, ideal) in FORMULAS.items()}
    assert metrics["divergence/tokens_compared"] == len(values)
    assert math.copysign(1, metrics["divergence/kl_k1"]) == 1  # not -0.0


@given(any_bits, st.data())
def test_one_flipped_bit_anywhere_is_found(patterns, data):
    at = data.draw(st.integers(0, len(patterns) - 1))
    flipped = patterns.copy()
    flipped[at] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    sequence, positions = np.arange(len(patterns)) // 3, np.arange(len(patterns)) % 3
    tokens = 100 + np.arange(len(patterns))
    trainer, rollout = patterns.view(np.float32), flipped.view(np.float32)
    metrics = divergence(trainer, rollout, sequence)
    assert metrics["divergence/tokens_nonzero"] == 1 and metrics["divergence/seqs_nonzero"] == 1
    assert metrics["divergence/tokens_nonzero_frac"] == 1 / len(patterns)
    found = first_mismatch(trainer, rollout, sequence, positions, tokens)
    assert (found.sample, found.position, found.token) == (at // 3, at % 3, 100 + at)
    assert (found.trainer_bits, found.rollout_bits) == (int(patterns[at]), int(flipped[at]))


@given(hnp.arrays(np.float32, 20, elements=st.floats(-20, 0, width=32)), st.integers(0, 2**32 - 1))
def test_formulas(trainer, seed):
    rollout = (trainer + np.random.default_rng(seed).normal(0, 0.1, 20)).astype(np.float32)
    metrics = divergence(trainer, rollout, np.arange(20))
    d = [float(t) - float(r) for t, r in zip(trainer, rollout, strict=True)]
    w = [math.exp(x) for x in d]
    expected = {
        "tokens_nonzero": sum(x != 0 for x in d),
        "logprob_abs_diff_mean": sum(map(abs, d)) / 20,
        "logprob_abs_diff_max": max(map(abs, d)),
        "kl_k1": -sum(d) / 20,
        "kl_k3": sum(math.expm1(x) - x for x in d) / 20,
        "mult_prob_error": sum(math.exp(abs(x)) for x in d) / 20,
        "ratio_min": min(w),
        "ratio_mean": sum(w) / 20,
        "ratio_max": max(w),
        "ess": sum(w) ** 2 / (20 * sum(x * x for x in w)),
    }
    for name, value in expected.items():
        assert metrics[f"divergence/{name}"] == pytest.approx(value, rel=1e-9, abs=1e-15), name


def test_pearson_is_that_of_the_probabilities():
    trainer, rollout = float32(-0.1, -2, -3, -0.5), float32(-0.2, -1.9, -3, -0.4)
    expected = np.corrcoef(np.exp(trainer.astype(np.float64)), np.exp(rollout.astype(np.float64)))[0, 1]
    assert divergence(trainer, rollout, np.zeros(4, int))["divergence/pearson"] == pytest.approx(expected)


def test_the_page_of_metrics_has_these_formulas():
    there = documented()
    assert {name: there.get(name) for name in FORMULAS} == {name: formula for name, (formula, _) in FORMULAS.items()}
    found = measure([Group(None, (Sample((), "", 1.0), Sample((), "", 0.0), Sample((), "", None)))])
    routing = RoutingReport(np.array([[3, 1]]), 1, 4, 0.5)
    ratios = np.zeros(3, np.float32)
    seen: Any = SimpleNamespace(
        batch=SimpleNamespace(logprobs=ratios), report=SimpleNamespace(logprobs=ratios, clipped=0, grad_norm=1.0)
    )
    names = [
        *replace(found, sets={"sums": found}).metrics(),
        *routing.metrics(),
        *updates([seen, seen]),
        *Drawn([], 1, 0).metrics(),
    ]
    assert not undocumented(names) and {
        "eval/left_out",
        "off_policy/ess",
        "sampling/rounds",
        "eval/sums/left_out",
    } <= set(names)
    assert undocumented(["eval/pass@8", "eval/pass@x", "response/new"]) == {"eval/pass@x", "response/new"}


def test_names_are_the_formulas_and_the_count():
    for rollout in (float32(-1), float32(-2)):
        assert set(divergence(float32(-1), rollout, np.array([0]))) == {*FORMULAS, "divergence/tokens_compared"}


def test_no_tokens():
    none = np.zeros(0, np.float32)
    metrics = divergence(none, none, np.zeros(0, np.int64))
    assert metrics["divergence/tokens_compared"] == 0 and metrics["divergence/tokens_nonzero"] == 0
    assert first_mismatch(none, none, *[np.zeros(0, np.int64)] * 3) is None


def test_zeros_of_both_signs_differ_and_equal_nans_do_not():
    nan = np.array([0x7FC00001, 0x7FC00001], np.uint32).view(np.float32)
    other = np.array([0x7FC00001, 0x7FC00002], np.uint32).view(np.float32)
    assert differs(float32(0.0), float32(-0.0)).tolist() == [True]
    assert differs(nan, nan.copy()).tolist() == [False, False]
    assert differs(nan, other).tolist() == [False, True]


def test_infinity_on_both_sides_is_no_gap_on_one_side_it_is_passed_on():
    both = divergence(float32(-np.inf, -1), float32(-np.inf, -2), np.array([0, 0]))
    assert both["divergence/logprob_abs_diff_max"] == 1.0
    one = divergence(float32(-np.inf, -1), float32(-1, -1), np.array([0, 1]))
    assert one["divergence/logprob_abs_diff_max"] == math.inf and one["divergence/ratio_min"] == 0.0
    assert math.isnan(divergence(float32(np.nan), float32(-1), np.array([0]))["divergence/logprob_abs_diff_max"])


@pytest.mark.filterwarnings("error")
@given(any_bits, any_bits)
def test_no_value_crashes_or_warns(a, b):
    n = min(len(a), len(b))
    divergence(a[:n].view(np.float32), b[:n].view(np.float32), np.arange(n))


def test_first_is_by_sample_and_position_not_by_place_in_memory():
    trainer, rollout = float32(-1, -2, -3), float32(-1.5, -2.5, -3.5)
    found = first_mismatch(trainer, rollout, np.array([2, 1, 1]), np.array([0, 9, 4]), np.array([7, 8, 9]))
    assert found == Mismatch(1, 4, 9, 0xC0400000, 0xC0600000, -3.0, -3.5)


def test_a_cast_or_another_shape_is_an_error():
    with pytest.raises(TypeError, match="float32"):
        differs(np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match=r"\[R\]"):
        differs(float32(1), float32(1, 2))
    with pytest.raises(ValueError, match="sample index"):
        divergence(float32(1), float32(1), np.zeros(2, int))
