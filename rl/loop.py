"""Goes through a run: publishes the first weights, evaluates, takes the GRPO steps with evaluations and checkpoints between
them, evaluates again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rl.checkpoints import Checkpoints, Progress
from rl.data import ProblemStream
from rl.errors import during
from rl.evaluation import Evaluation
from rl.journal import Journal
from rl.run.screen import Bar
from rl.step import Cards
from trainer.batch import Batch


class Steps(Protocol):
    """Declares what the loop asks of whoever takes its steps (`step.py`, `lag.py`)."""

    @property
    def publish(self) -> Callable[[int], tuple[int, int] | None]:
        """Returns what makes both sides hold the same bits, as the version it is called with, or stops the run."""

    def __call__(self, step: int, show: bool) -> tuple[dict[str, Any], Batch]:
        """Takes step `step`; returns its metrics and its batch. `show`: keep some of its completions."""

    def ahead(self) -> dict[str, bytes]:
        """Returns what a checkpoint needs beside the weights, by file name."""


class Trainer(Protocol):
    """Declares what the loop asks of the trainer beside its steps."""

    def digest(self) -> str:
        """Returns the SHA-256 of the weights as they are served."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Takes a run from its first step to its last."""

    step: Steps
    stream: ProblemStream
    evaluate: Callable[[int], Evaluation]  # after so many steps
    speeds: Callable[[Batch, dict[str, Any]], dict[str, float]]  # of a step's batch and metrics
    trainer: Trainer
    cards: Cards
    journal: Journal
    checkpoints: Checkpoints
    bar: Bar
    steps: int  # the last one
    eval_every: int

    def run(self, state: Progress) -> tuple[float, float]:
        """Takes the GRPO steps after `state`, whose weights are published first. Returns the accuracy before and after all."""
        self.step.publish(state.step)
        if not state.accuracy:
            first = self.evaluate(0)
            state = replace(state, accuracy=(first.accuracy,))
            self.journal.step(0, first.metrics())
        (before,) = state.accuracy
        self.checkpoints.settle()
        after, self.stream.cursor = before, state.cursor
        with self.bar:
            for step in range(state.step + 1, self.steps + 1):
                with during(f"step {step}"):
                    after = self._one(step, state, after)
        if self.steps:
            last = self.evaluate(self.steps)
            self.journal.step(self.steps + 1, last.metrics())
            after = last.accuracy
        return before, after

    def _one(self, step: int, state: Progress, accuracy: float) -> float:
        """Takes a step, and evaluates and saves where that is due; returns the last accuracy that is known."""
        show = step == self.steps or (step - 1) % 10 == 0
        metrics, batch = self.step(step, show)
        metrics |= self.speeds(batch, metrics)
        if self.eval_every and step % self.eval_every == 0 and step < self.steps:
            last = self.evaluate(step)
            metrics |= last.metrics()
            accuracy = last.accuracy
        self.journal.step(step, metrics)
        if self.checkpoints.due(step, self.steps):
            self._save(replace(state, step=step, cursor=self.stream.cursor))
        self.bar(step, self.steps, told(metrics, accuracy))
        return accuracy

    def _save(self, state: Progress) -> None:
        totals = self.journal.totals
        state = replace(state, tokens_compared=totals.tokens_compared, tokens_nonzero=totals.tokens_nonzero)
        self.cards.to_trainer(weights_stay=True)
        self.checkpoints.save(state, self.trainer.digest(), self.step.ahead())


def told(metrics: dict[str, Any], accuracy: float) -> str:
    """Says a step in one line; `accuracy`: of the last evaluation."""
    differing = metrics.get("divergence/tokens_nonzero")  # None where this step's were not compared
    gap = "0" if differing == 0 else "-"
    if differing:
        gap = f"{metrics['divergence/logprob_abs_diff_max']:.2g} ({int(differing):,} tokens differ)"
    return (
        f"reward {metrics['reward/mean']:.3f}  accuracy {accuracy:.3f}  {metrics['speed/step_tokens_per_s']:,.0f} tokens/s  "
        f"gap {gap}"
    )
