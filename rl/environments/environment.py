"""Says what an environment is."""

from collections.abc import Callable, Sequence
from typing import Protocol

from rl.data import Problem
from rl.samples import Group, Sample, Transcript
from rollout.sampling import Completion, Request

Generate = Callable[[Sequence[Request]], list[Completion]]
"""The engines: completions in the order of the requests, the samples of each side by side."""


class Environment(Protocol):
    """Plays conversations between policy and problem, and judges them."""

    def play(self, requests: Sequence[Request], generate: Generate) -> list[Transcript]:
        """Returns what came of each request, which is the first turn of its conversation; the order is that of the requests."""

    def judge(self, problem: Problem, transcript: Transcript) -> Sample:
        """Returns the sample with its reward. UserError names the problem and the completion where the reward fails."""


def score(problems: Sequence[Problem], transcripts: Sequence[Transcript], environment: Environment) -> list[Group]:
    """Makes groups of len(transcripts) / len(problems) consecutive transcripts, each judged."""
    size = len(transcripts) // len(problems)
    groups = []
    for i, problem in enumerate(problems):
        mine = transcripts[i * size : (i + 1) * size]
        groups.append(Group(problem, tuple(environment.judge(problem, transcript) for transcript in mine)))
    return groups
