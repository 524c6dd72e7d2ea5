"""The KL term in the rewards: what the papers say of it, in float64, and which keys do not combine with it."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.algorithms import open_algorithm
from rl.algorithms.algorithm import AlgorithmSection, FrozenAsked
from rl.algorithms.grpo import GrpoSection
from rl.algorithms.gspo import GspoSection
from rl.algorithms.reinforce_plus_plus import ReinforceSection
from rl.compose import check
from rl.errors import UserError
from rl.samples import Group
from tests.rl.algorithms.groups import PLAIN, group
from trainer.loss import PolicyLoss, RegularisedLoss, SequencePolicyLoss

SIZES = st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=4), min_size=1, max_size=3)
KEYS = {"prompts_per_step": 1, "group_size": 2, "loss_mean": "token", "clip_low": 0.2, "clip_high": 0.2}
ESTIMATES = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: np.exp(-d) - 1 + d}


def drawn_groups(sizes: list[list[int]], seed: int) -> tuple[list[Group], np.ndarray, np.ndarray]:
    """(groups whose tokens have log-probs of their own, d of each token, the reference's log-probs)."""
    random = np.random.default_rng(seed)
    groups, gaps, reference = [], [], []
    for of_group in sizes:
        plain = group([[n] for n in of_group], random.choice([0.0, 1.0, 0.25], len(of_group)).tolist())
        samples = []
        for sample in plain.samples:
            completion = sample.completions[0]
            logprobs = (-2 * random.random(len(completion.token_ids))).astype(np.float32)
            gap = random.standard_normal(len(logprobs)).astype(np.float32)
            changed = replace(completion, logprobs=tuple(logprobs.tolist()))
            samples.append(replace(sample, transcript=(sample.transcript[0], changed)))
            reference.append(logprobs - gap)
            gaps.append(logprobs.astype(np.float64) - reference[-1].astype(np.float64))
        groups.append(replace(plain, samples=tuple(samples)))
    return groups, np.concatenate(gaps), np.concatenate(reference)


def pieces(groups: list[Group], x: np.ndarray) -> list[list[np.ndarray]]:
    """The tokens' numbers, by group and sample."""
    cut = iter(np.split(x, np.cumsum([len(s.completions[0].token_ids) for g in groups for s in g.samples])[:-1]))
    return [[next(cut) for _ in g.samples] for g in groups]


@pytest.mark.parametrize("estimator", ESTIMATES)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=SIZES, seed=st.integers(0, 999), coef=st.floats(0.01, 2))
def test_grpo_takes_it_from_the_reward_of_a_sample(
    estimator: str, sizes: list[list[int]], seed: int, coef: float
) -> None:
    groups, d, reference = drawn_groups(sizes, seed)
    keys = KEYS | {"name": "grpo", "advantage": "dr_grpo"} | PLAIN
    section = GrpoSection.model_validate(keys | {"kl_coef": coef, "kl_in": "reward", "kl_estimator": estimator})
    batch = open_algorithm(section, 9).batch(groups, reference)
    expected = []
    for one, lost in zip(groups, pieces(groups, ESTIMATES[estimator](d)), strict=True):
        rewards = np.array([s.reward - coef * mine.sum() for s, mine in zip(one.samples, lost, strict=True)])
        expected += [np.full(len(mine), r) for r, mine in zip(rewards - rewards.mean(), lost, strict=True)]
    np.testing.assert_allclose(batch.advantages, np.concatenate(expected), rtol=1e-5, atol=2e-5)
    assert (batch.reference == reference).all()


@pytest.mark.parametrize("baseline", ["batch", "group"])
@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=SIZES, seed=st.integers(0, 999), coef=st.floats(0.01, 2))
def test_reinforce_takes_it_from_the_reward_of_a_token(
    baseline: str, sizes: list[list[int]], seed: int, coef: float
) -> None:
    """A token is worth the reward less the KL of itself and of all after it (Hu 2025, equations 2 and 3)."""
    groups, d, reference = drawn_groups(sizes, seed)
    keys = KEYS | {"name": "reinforce_plus_plus", "baseline": baseline} | PLAIN
    section = ReinforceSection.model_validate(keys | {"kl_coef": coef, "kl_in": "reward", "kl_estimator": "k1"})
    batch = open_algorithm(section, 9).batch(groups, reference)
    worth = []
    for one, lost in zip(groups, pieces(groups, d), strict=True):
        mean = np.mean([s.reward for s in one.samples]) if baseline == "group" else 0
        worth += [
            s.reward - mean - coef * np.cumsum(mine[::-1])[::-1] for s, mine in zip(one.samples, lost, strict=True)
        ]
    a = np.concatenate(worth)
    expected = (a - a.mean()) / (a.std() + 1e-8) if len(a) > 1 else 0 * a
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["grpo", "reinforce_plus_plus"])
def test_nothing_lost_is_the_run_without_it(name: str) -> None:
    """A policy that is its own reference: the same bits as with no term at all."""
    groups, _, _ = drawn_groups([[3, 4], [2, 5]], 1)
    own = np.array([x for g in groups for s in g.samples for x in s.completions[0].logprobs], dtype=np.float32)
    kind = {"grpo": GrpoSection, "reinforce_plus_plus": ReinforceSection}[name]
    more = {"advantage": "grpo"} if name == "grpo" else {"baseline": "batch"}
    section = kind.model_validate(KEYS | {"name": name} | more | PLAIN)
    with_term = section.model_copy(update={"kl_coef": 0.5, "kl_in": "reward"})
    plain, found = (open_algorithm(s, 9).batch(groups, own) for s in (section, with_term))
    assert plain.advantages.tobytes() == found.advantages.tobytes()


def test_in_the_loss_it_stands_beside_the_policys() -> None:
    keys = KEYS | {"name": "gspo", "advantage": "grpo"} | PLAIN | {"kl_coef": 0.25, "kl_estimator": "k2"}
    section = GspoSection.model_validate(keys)
    loss = open_algorithm(section, 9).loss
    assert loss == RegularisedLoss(SequencePolicyLoss(0.2, 0.2), 0.25, "k2")
    assert open_algorithm(section.model_copy(update={"kl_in": "reward"}), 9).loss == SequencePolicyLoss(0.2, 0.2)
    groups, _, reference = drawn_groups([[3, 4]], 1)
    assert (open_algorithm(section, 9).batch(groups, reference).reference == reference).all()


def test_entropy_stands_there_too() -> None:
    for keys, loss in (
        (["algorithm.kl_coef=0.5"], RegularisedLoss(PolicyLoss(0.2, 0.28), 0.5, "k3", 0.25)),
        (["algorithm.kl_coef=0.5", "algorithm.kl_in=reward"], RegularisedLoss(PolicyLoss(0.2, 0.28), 0.0, "k3", 0.25)),
        ([], RegularisedLoss(PolicyLoss(0.2, 0.28), 0.0, "k3", 0.25)),
    ):
        (config,) = check([*keys, "algorithm.entropy_coef=0.25"])
        assert open_algorithm(config.algorithm, 9).loss == loss
    assert check(["algorithm.entropy_coef=0.25"])[0].algorithm.frozen is None


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "reinforce_plus_plus"])
def test_every_algorithm_has_it(name: str) -> None:
    (config,) = check([f"algorithm={name}", "algorithm.kl_coef=0.1"])
    assert isinstance(open_algorithm(config.algorithm, 9).loss, RegularisedLoss)
    assert config.algorithm.frozen == FrozenAsked("algorithm.reference", None, None)
    assert not isinstance(open_algorithm(check([f"algorithm={name}"])[0].algorithm, 9).loss, RegularisedLoss)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"reference": "somewhere"}, "algorithm.reference=somewhere with algorithm.kl_coef=0: nothing would ask it"),
        (
            {"kl_coef": 0.1, "kl_in": "reward", "sampling_rounds": 2},
            "algorithm.sampling_rounds=2 with algorithm.kl_in=",
        ),
    ],
)
def test_keys_that_do_not_combine(keys: dict[str, object], line: str) -> None:
    section: AlgorithmSection = GrpoSection.model_validate(KEYS | {"name": "grpo", "advantage": "grpo"} | PLAIN | keys)
    with pytest.raises(UserError, match=re.escape(line)):
        section.check(9)
    assert open_algorithm(section.model_copy(update={"kl_coef": 0.0}), 9).loss == PolicyLoss(0.2, 0.2)
