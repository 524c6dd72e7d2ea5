"""From completions to groups with rewards and advantages."""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rl.data import Judge, Problem, Source
from rl.errors import UserError
from rollout.sampling import Completion

_LARGEST = 1e30  # of a reward: advantages are float32


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


def judge_of(source: Source, reward: str | None) -> Judge:
    """The data's own verifier, or the user's `module:function`."""
    if reward is None:
        return source.judge
    module, _, function = reward.partition(":")
    try:
        judge = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise UserError(f"reward={reward!r} (module:function): {type(error).__name__}: {error}") from None
    for text in (source.train[0].solution, ""):  # found wrong now, not after the warm start
        _reward(judge, source.train[0], text)
    return judge


def score(problem: Problem, completions: Sequence[Completion], source: Source, judge: Judge) -> list[Sample]:
    samples = []
    for completion in completions:
        text = source.tokenizer.decode(completion.token_ids)
        samples.append(Sample(completion, text, _reward(judge, problem, text)))
    return samples


def _reward(judge: Judge, problem: Problem, text: str) -> float:
    try:
        reward = float(judge(problem, text))
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"the reward raised {kind}: {error}; problem {problem.id!r}, completion {text!r}") from error
    if not math.isfinite(reward):
        raise UserError(f"the reward is {reward}, not a number; problem {problem.id!r}, completion {text!r}")
    if abs(reward) > _LARGEST:
        raise UserError(f"the reward is {reward}, beyond {_LARGEST}; problem {problem.id!r}, completion {text!r}")
    return reward


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
    problems: Sequence[Problem], completions: Sequence[Completion], source: Source, judge: Judge, kind: str
) -> list[Group]:
    """Groups of len(completions) / len(problems) consecutive completions."""
    size = len(completions) // len(problems)
    groups = []
    for i, problem in enumerate(problems):
        samples = score(problem, completions[i * size : (i + 1) * size], source, judge)
        groups.append(Group(problem, tuple(samples), advantages([s.reward for s in samples], kind)))
    return groups
