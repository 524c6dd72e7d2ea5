"""Computes what the reward of each sample is worth, against its group's or against all of the batch.

A reward of None is no reward: the sample is left out of every sum below, and its advantage is 0. Sums are exact (fsum), and
square roots IEEE 754's, so that no result depends on the machine.
"""

import math
from collections.abc import Sequence
from typing import Literal

from rl.samples import Group

Rewards = Sequence[float | None]
Advantage = Literal["grpo", "dr_grpo", "rloo"]


def judged(rewards: Rewards) -> list[float]:
    """Returns the rewards that there are."""
    return [r for r in rewards if r is not None]


def has_signal(group: Group) -> bool:
    """Says whether the samples of a group teach anything when they are compared with each other: two rewards differ."""
    return len(set(judged(group.rewards))) > 1


def group_advantages(rewards: Rewards, kind: Advantage) -> tuple[float, ...]:
    """Computes what each reward of a group is worth, with r the rewards that there are and n their number:

        grpo     (r - mean) / (std + 1e-4), std with n - 1     (Shao et al. 2024, section 4.1.2)
        dr_grpo  r - mean                                      (Liu et al. 2025, "Dr. GRPO", section 3)
        rloo     r - mean of the others                        (Ahmadian et al. 2024, section 3.2)

    Where n < 2 there is nothing to compare with, and all are worth 0.
    """
    there = judged(rewards)
    n = len(there)
    if n < 2:
        return (0.0,) * len(rewards)
    mean = math.fsum(there) / n
    centred = [0.0 if r is None else r - mean for r in rewards]
    if kind == "dr_grpo":
        return tuple(centred)
    if kind == "rloo":
        return tuple(c * n / (n - 1) for c in centred)
    std = math.sqrt(math.fsum(c * c for c in centred) / (n - 1))
    return tuple(c / (std + 1e-4) for c in centred)


def normalised(worth: Rewards, counts: Sequence[int]) -> tuple[float, ...]:
    """Computes (a - mean) / (std + 1e-8) of the a = `worth` that there are: mean and standard deviation (with N) are those of
    all N tokens of a batch, of which sample i has `counts[i]`, each worth `worth[i]` (Hu 2025, "REINFORCE++")."""
    there = [(a, n) for a, n in zip(worth, counts, strict=True) if a is not None]
    tokens = max(1, math.fsum(n for _, n in there))
    mean = math.fsum(n * a for a, n in there) / tokens
    std = math.sqrt(math.fsum(n * (a - mean) * (a - mean) for a, n in there) / tokens)
    return tuple(0.0 if a is None else (a - mean) / (std + 1e-8) for a in worth)
