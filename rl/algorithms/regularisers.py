"""Keeps the policy near a reference, by the KL term in the loss or in the rewards, and its entropy up."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from rl.algorithms.advantages import Rewards
from rl.algorithms.algorithm import AlgorithmSection
from rl.samples import Group
from trainer.loss import Loss, RegularisedLoss, kl_estimate


def regularised(loss: Loss, section: AlgorithmSection) -> Loss:
    """Returns `loss` with the KL term, where it belongs into the loss, and the entropy bonus."""
    in_loss = section.kl_coef if section.kl_in == "loss" else 0.0
    if not in_loss and not section.entropy_coef:
        return loss
    return RegularisedLoss(loss, in_loss, section.kl_estimator, section.entropy_coef)


def penalties(
    groups: Sequence[Group], section: AlgorithmSection, reference: np.ndarray | None
) -> list[list[float]] | None:
    """Computes what the reward of each sampled token of each sample loses: kl_coef times the KL estimate, by the log-probs that
    it was sampled with (Ouyang et al. 2022, "InstructGPT", equation 2). None where nothing is taken from rewards."""
    if not section.kl_coef or section.kl_in != "reward":
        return None
    assert reference is not None
    samples = [sample for group in groups for sample in group.samples]
    logprobs = torch.tensor([x for s in samples for c in s.completions for x in c.logprobs], dtype=torch.float32)
    values, _ = kl_estimate(logprobs, torch.from_numpy(reference), section.kl_estimator)
    rest = iter([section.kl_coef * value for value in values.tolist()])
    return [[next(rest) for c in s.completions for _ in c.token_ids] for s in samples]


def less(rewards: Sequence[Rewards], lost: Sequence[Sequence[float]] | None) -> list[Rewards]:
    """Takes from the reward of each sample, by groups, what all its tokens lose (`penalties`). The sum is exact."""
    if lost is None:
        return list(rewards)
    of_samples = iter(lost)
    return [
        [None if r is None else r - math.fsum(mine) for r, mine in zip(of_group, of_samples, strict=False)]
        for of_group in rewards
    ]


def still_to_lose(lost: Sequence[float]) -> list[float]:
    """Computes for each token what it and those after it lose, added up from the last token back: one order."""
    return list(itertools.accumulate(reversed(lost)))[::-1]
