"""Takes supervised steps before GRPO: the warm start."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rl.checkpoints import Checkpoints, Progress
from rl.config import WarmupSection
from rl.data import WARMUP, Problem, ProblemStream, Source
from rl.data.draws import Draws
from rl.errors import during
from rl.pack import pack_demonstrations, pack_supervised
from rl.run.screen import Bar, Screen
from rl.samples import Transcript
from trainer.batch import Batch, StepReport
from trainer.loss import LikelihoodLoss, Loss

Record = Callable[[int, dict[str, Any]], None]
"""Logs the metrics of a step."""
Demonstrate = Callable[[Sequence[Problem]], list[Transcript]]
"""Plays a conversation about each problem, as a teacher would."""


class Student(Protocol):
    """Declares what the warm start asks of the trainer."""

    def step(self, batch: Batch, loss: Loss, lr: float) -> StepReport:
        """Does one optimizer step on the batch."""

    def reset_optimizer(self) -> None:
        """Sets the moments to zero."""

    def digest(self) -> str:
        """Returns the SHA-256 of the weights as they are served."""


class Lessons(Protocol):
    """Draws what is taught in each step, and says by which loss."""

    stream: ProblemStream

    @property
    def loss(self) -> Loss:
        """Returns the loss of each row."""

    def batch(self, step: int) -> Batch:
        """Draws the batch of a step, the next of the stream."""

    def measure(self, batch: Batch, report: StepReport) -> dict[str, float]:
        """Returns further metrics of a step."""


class Demonstrations:
    """Draws the batches of the warm start: a function of the seed and the step, from where `cursor` is.

    The teacher is as good as the config says: `wrong_frac` of the demonstrations carry the solution of another problem.
    What the verifier teaches afterwards can therefore be more than imitation could.
    """

    def __init__(
        self,
        section: WarmupSection,
        source: Source,
        seed: int,
        longest: int,
        cursor: int,
        demonstrate: Demonstrate | None = None,
    ) -> None:
        """`longest`: tokens of a solution that are shown. `demonstrate`: plays whole conversations in the place of solutions;
        their teacher is as good as it is."""
        self._demonstrate = demonstrate
        self.section, self.source, self.seed, self.longest = section, source, seed, longest
        self.stream = source.stream(seed, WARMUP)
        self.stream.cursor = cursor

    @property
    def loss(self) -> Loss:
        """Returns the likelihood."""
        return LikelihoodLoss()

    def measure(self, batch: Batch, report: StepReport) -> dict[str, float]:
        """Returns nothing beside the loss."""
        return {}

    def batch(self, step: int) -> Batch:
        """Draws the demonstrations of step `step`, the next ones of the stream."""
        problems, noise = self.stream.take(self.section.sequences), Draws(self.seed, step)
        if self._demonstrate:
            return pack_demonstrations(self._demonstrate(problems))
        wrong = [noise.fraction() < self.section.wrong_frac for _ in problems]
        shown = [problems[noise.below(len(problems))] if w else p for p, w in zip(problems, wrong, strict=True)]
        solutions = [self.source.encode_solution(p)[: self.longest] for p in shown]
        return pack_supervised(list(zip(problems, solutions, strict=True)))


def warm_start(
    section: WarmupSection,
    lessons: Lessons,
    trainer: Student,
    state: Progress,
    checkpoints: Checkpoints,
    record: Record,
    console: Screen,
) -> Progress:
    """Takes the supervised steps that `state` has not done; the learning rate falls linearly from warmup.lr to 0. What they end
    with is on the disk before GRPO begins."""
    if state.supervised == section.steps:
        return state
    with Bar(console, "warm start") as bar:
        for step in range(state.supervised, section.steps):
            start = time.perf_counter()
            batch = lessons.batch(step)
            with bar.phase("training"):
                with during(f"step {step + 1} of the warm start"):
                    report = trainer.step(batch, lessons.loss, section.lr * (1 - step / section.steps))
            seconds = time.perf_counter() - start
            told = {"policy/loss": report.loss, "policy/grad_norm": report.grad_norm, "time/train": seconds}
            record(step, {"phase": "warmup", **told, **lessons.measure(batch, report)})
            speed = f"{len(batch.token_ids) / seconds:,.0f} tokens/s"
            bar(step + 1, section.steps, f"loss {report.loss:.3f}  {speed}")
            state = replace(state, supervised=step + 1, warmup_cursor=lessons.stream.cursor)
            checkpoints.settle()
            if step + 1 < section.steps and checkpoints.due(step + 1, section.steps):
                checkpoints.save(state, trainer.digest())
    trainer.reset_optimizer()
    if checkpoints.due(section.steps, section.steps):
        checkpoints.save(state, trainer.digest())
        checkpoints.settle(wait=True)
    return state
