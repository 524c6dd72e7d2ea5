"""Samples: what the policy wrote for a problem, piece by piece, and what it earned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rl.data import Problem
from rollout.sampling import Completion

Transcript = tuple[tuple[int, ...] | Completion, ...]
"""A sequence in pieces, in their order: tokens that were given (a prompt, what an environment answers) and completions that
were sampled after all that stands before them."""


@dataclass(frozen=True)
class Sample:
    """Holds a transcript, its text and its reward. One without a reward is left out of the loss and of its group's mean."""

    transcript: Transcript
    text: str  # what was judged
    reward: float | None  # None: nothing judges it, or judging failed and the run drops such samples
    parts: Mapping[str, float] = field(default_factory=dict)  # each reward that has a say, by name, before its weight
    notes: Mapping[str, Any] = field(default_factory=dict)  # what rewards say beside their value, by "NAME/what"
    error: str = ""  # why judging failed
    counts: Mapping[str, float] = field(default_factory=dict)  # what its environment counted

    @property
    def completions(self) -> list[Completion]:
        """Returns what the policy wrote in the transcript, piece by piece."""
        return completions(self.transcript)


@dataclass(frozen=True)
class Group:
    """Holds all samples of one problem."""

    problem: Problem
    samples: tuple[Sample, ...]

    @property
    def rewards(self) -> list[float | None]:
        """Returns the rewards, in the order of the samples; None of a sample that is left out."""
        return [sample.reward for sample in self.samples]


def completions(transcript: Transcript) -> list[Completion]:
    """Returns the sampled pieces."""
    return [piece for piece in transcript if isinstance(piece, Completion)]


def sampled_counts(transcripts: Sequence[Transcript]) -> np.ndarray:
    """Counts the sampled tokens of each sequence: int64 [S]."""
    return np.array([sum(len(c.token_ids) for c in completions(t)) for t in transcripts], dtype=np.int64)
