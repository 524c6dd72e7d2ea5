"""Evaluates the policy on held-out problems, in the environment that it is trained in."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console

from rl.data import Problem
from rl.environments.environment import Environment, Generate
from rl.errors import UserError
from rl.run.screen import Waiting
from rollout.sampling import Request


@dataclass(frozen=True)
class Evaluation:
    """Holds what the policy earned on the held-out problems."""

    accuracy: float  # share of the problems whose completion earns 1 or more, of those that are judged
    reward: float  # mean over these

    def metrics(self) -> dict[str, float]:
        """Names the values as a log does."""
        return {"eval/accuracy": self.accuracy, "eval/reward": self.reward}


class Cards(Protocol):
    """Declares what an evaluation asks of those who share the cards."""

    def to_rollout(self) -> None:
        """Gives the cards to the engines."""


class Evaluator:
    """Samples one conversation for each problem, always with the same seeds; says what they earn, and by what."""

    def __init__(
        self, problems: Sequence[Problem], requests: Sequence[Request], environment: Environment, judged_by: str
    ) -> None:
        """`requests`: one a problem."""
        self.problems, self.requests, self.environment, self.judged_by = problems, requests, environment, judged_by

    def __call__(self, generate: Generate, cards: Cards, compare: Callable[[], None], console: Console) -> Evaluation:
        """`compare` raises where what the engines sample from is not what the trainer has."""
        with Waiting(console, f"evaluating on {len(self.problems):,} held-out problems"):
            cards.to_rollout()
            compare()
            transcripts = self.environment.play(self.requests, generate)
        samples = self.environment.judge(self.problems, transcripts)
        earned = [sample.reward for sample in samples if sample.reward is not None]
        if not earned:
            why = next((f", first: {s.error}" for s in samples if s.error), "")
            raise UserError(f"an evaluation in which no completion is judged: {self.judged_by} leaves all out{why}")
        right, count = sum(r >= 1 for r in earned), len(earned)
        left = f", {len(samples) - count} left out" if count < len(samples) else ""
        found = Evaluation(right / count, math.fsum(earned) / count)
        console.print(
            f"held-out accuracy {found.accuracy:.3f} ({right} of {count} earn 1{left}, mean reward {found.reward:.3f}, by "
            f"{self.judged_by}; temperature {self.requests[0].sampling.temperature})",
            soft_wrap=True,
        )
        return found
