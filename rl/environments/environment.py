"""Says what an environment is."""

from collections.abc import Sequence
from typing import Protocol

from rl.data import Problem
from rl.samples import Group, Sample, Transcript
from rollout.replies import Replies
from rollout.sampling import Completion, Request


class Generate(Protocol):
    """Declares what a conversation asks of the engines."""

    def __call__(self, requests: Sequence[Request], replies: Replies | None = None, /) -> list[Completion]:
        """Returns completions in the order of the requests, the samples of each side by side. With `replies`, serves what
        follows them too, while others are still being sampled; of all of these only the replies hear."""


class Environment(Protocol):
    """Plays conversations between policy and problem, and judges them."""

    @property
    def judged_by(self) -> str:
        """Says who judges."""

    def play(self, requests: Sequence[Request], generate: Generate, problems: Sequence[Problem]) -> list[Transcript]:
        """Returns what came of each request, which is the first turn of its conversation; the order is that of the requests,
        of which those of one problem stand side by side."""

    def judge(self, problems: Sequence[Problem], transcripts: Sequence[Transcript]) -> list[Sample]:
        """Returns the samples with their rewards; transcript i is of problem i, and those of one problem stand side by side.
        UserError names the problem and the completion where the reward fails."""


def score(problems: Sequence[Problem], transcripts: Sequence[Transcript], environment: Environment) -> list[Group]:
    """Makes groups of len(transcripts) / len(problems) consecutive transcripts, each judged."""
    size = len(transcripts) // len(problems)
    samples = environment.judge([problem for problem in problems for _ in range(size)], transcripts)
    return [Group(p, tuple(samples[i * size : (i + 1) * size])) for i, p in enumerate(problems)]
