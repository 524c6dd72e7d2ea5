"""From completions to groups with rewards and advantages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rl.data import Problem, Source
from rl.rewards.reward import Reward
from rollout.sampling import Completion


@dataclass(frozen=True)
class Sample:
    completion: Completion
    text: str
    reward: float


@dataclass(frozen=True)
class Group:
    """All samples of one problem, and what each is worth against the others."""

    problem: Problem
    samples: tuple[Sample, ...]
    advantages: tuple[float, ...]


def score(problem: Problem, completions: Sequence[Completion], source: Source, reward: Reward) -> list[Sample]:
    samples = []
    for completion in completions:
        text = source.tokenizer.decode(completion.token_ids)
        samples.append(Sample(completion, text, reward(problem, text)))
    return samples


def advantages(rewards: Sequence[float], kind: str) -> tuple[float, ...]:
    """What each reward of a group is worth, with r the rewards and n their number:

        grpo     (r - mean) / (std + 1e-4), std with n - 1     (Shao et al. 2024, section 4.1.2)
        dr_grpo  r - mean                                      (Liu et al. 2025, "Dr. GRPO", section 3)
        rloo     r - mean of the others                        (Ahmadian et al. 2024, section 3.2)

    Sums are exact (fsum), so the result does not depend on the machine.
    """
    n = len(rewards)
    mean = math.fsum(rewards) / n
    centred = [r - mean for r in rewards]
    if kind == "dr_grpo":
        return tuple(centred)
    if kind == "rloo":
        return tuple(c * n / (n - 1) for c in centred)
    std = math.sqrt(math.fsum(c * c for c in centred) / (n - 1))
    return tuple(c / (std + 1e-4) for c in centred)


def group(
    problems: Sequence[Problem], completions: Sequence[Completion], source: Source, reward: Reward, kind: str
) -> list[Group]:
    """Groups of len(completions) / len(problems) consecutive completions."""
    size = len(completions) // len(problems)
    groups = []
    for i, problem in enumerate(problems):
        samples = score(problem, completions[i * size : (i + 1) * size], source, reward)
        groups.append(Group(problem, tuple(samples), advantages([s.reward for s in samples], kind)))
    return groups
