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

    def judge(self, problems: Sequence[Problem], transcripts: Sequence[Transcript]) -> list[Sample]:
        """Returns the samples with their rewards; transcript i is of problem i, and those of one problem stand side by side.
        UserError names the problem and the completion where the reward fails."""


def score(problems: Sequence[Problem], transcripts: Sequence[Transcript], environment: Environment) -> list[Group]:
    """Makes groups of len(transcripts) / len(problems) consecutive transcripts, each judged."""
    size = len(transcripts) // len(problems)
    samples = environment.judge([problem for problem in problems for _ in range(size)], transcripts)
    return [Group(p, tuple(samples[i * size : (i + 1) * size])) for i, p in enumerate(problems)]
