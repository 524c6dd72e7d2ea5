"""REINFORCE++: its formulas in float64, token by token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms import open_algorithm
from rl.algorithms.reinforce_plus_plus import ReinforceSection
from tests.rl.algorithms.groups import PLAIN, group
from trainer.loss import PolicyLoss

REWARD = st.sampled_from([None, 0.0, 1.0, -0.5, 0.25, 3.0])
SAMPLES = st.lists(st.lists(st.tuples(REWARD, st.integers(0, 5)), min_size=1, max_size=4), min_size=1, max_size=4)


def section(baseline: str, **more: object) -> ReinforceSection:
    keys = {"name": "reinforce_plus_plus", "prompts_per_step": 2, "group_size": 1, "loss_mean": "token"}
    return ReinforceSection.model_validate(
        keys | {"clip_low": 0.2, "clip_high": 0.2, "baseline": baseline} | PLAIN | more
    )


@pytest.mark.parametrize("baseline", ["batch", "group"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=SAMPLES)
def test_its_formula(baseline: str, drawn: list[list[tuple[float | None, int]]]) -> None:
    groups = [group([[n] for _, n in one], [r for r, _ in one]) for one in drawn]
    batch = open_algorithm(section(baseline), 9).batch(groups)
    worth: list[float] = []  # of each token; NaN: left out
    for one in drawn:
        there = [r for r, _ in one if r is not None]
        alone = baseline == "group" and len(there) < 2
        base = np.mean(there) if baseline == "group" and not alone else 0.0
        worth += [np.nan if r is None or alone else r - base for r, n in one for _ in range(n)]
    a = np.array(worth, dtype=np.float64)
    kept = ~np.isnan(a)
    if kept.any():
        a = (a - a[kept].mean()) / (a[kept].std() + 1e-8)
    np.testing.assert_allclose(batch.advantages, np.where(kept, a, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batch.weights, kept / max(1, kept.sum()), rtol=1e-6)


def test_its_keys_make_its_loss() -> None:
    assert open_algorithm(section("batch"), 9).loss == PolicyLoss(0.2, 0.2)
