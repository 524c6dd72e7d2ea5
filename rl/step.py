"""Takes one step of reinforcement learning: samples, scores, trains, compares, publishes.

It names no engine, no algorithm and no file: what it works with is passed in (`rl/train.py` builds it, tests pass fakes).
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from rl import align
from rl.algorithms.algorithm import Algorithm
from rl.clock import Clock
from rl.data import Problem
from rl.dynamic_sampling import Drawn, draw_groups
from rl.environments.environment import Environment, score
from rl.journal import Compared, Journal, found
from rl.pack import pack
from rl.replay.keeper import Keeping, KeepsNothing
from rl.samples import Group
from rl.updates import Update, from_critic, from_reference, parts
from rollout.replies import Replies
from rollout.sampling import Completion, Request
from trainer.batch import Batch, StepReport
from trainer.loss import Loss


class Rollout(Protocol):
    """Declares what a step asks of the engines."""

    def generate(self, requests: Sequence[Request], replies: Replies | None = None) -> list[Completion]:
        """Generates the completions of all requests, in their order, the samples of each side by side; with `replies` also
        what follows them, of which only the replies hear."""


class Trainer(Protocol):
    """Declares what a step asks of the trainer."""

    def step(self, batch: Batch, loss: Loss, lr: float) -> StepReport:
        """Does one optimizer step on the batch."""

    def logprobs(self, batch: Batch) -> np.ndarray:
        """Returns the policy's log-probs of all loss rows, by the weights as they are."""

    def remember(self) -> None:
        """Keeps the policy's weights as they are, until the next call."""

    def past_logprobs(self, batch: Batch) -> np.ndarray:
        """Returns the log-probs of all loss rows by the weights that were remembered."""

    def critic_values(self, batch: Batch) -> np.ndarray:
        """Returns what the critic says before each loss row."""

    def step_critic(self, batch: Batch, loss: Loss, lr: float) -> StepReport:
        """Does one optimizer step of the critic."""


class Cards(Protocol):
    """Gives the memory of the cards to one side or the other (`rl/handover.py`)."""

    def to_rollout(self) -> None:
        """Gives the cards to the engines."""

    def to_trainer(self, weights_stay: bool) -> None:
        """Gives the cards to the trainer; `weights_stay` where the engines sample again before the next publication."""


class Stream(Protocol):
    """Gives problems in the run's order."""

    def take(self, count: int) -> list[Problem]:
        """Returns the next `count` problems."""


@dataclass(frozen=True)
class Critic:
    """Says how the critic is trained."""

    loss: Loss
    lr: Callable[[int], float]  # of a step


def sent(published: tuple[int, int] | None) -> dict[str, float]:
    """Returns the metrics of a publication: the bytes that it carried, and those that went to other hosts, where any did."""
    if published is None:
        return {}
    carried, crossed = (size / 2**30 for size in published)
    return {"publish/carried_gib": carried} | ({"network/published_gib": crossed} if crossed else {})


@dataclass(frozen=True, kw_only=True)
class Step:
    """Takes steps. `phase(what)` shows what a step is at while it is open."""

    stream: Stream
    requests_for: Callable[
        [Sequence[Problem], int, int], Sequence[Request]
    ]  # of problems, step, the first's number in it
    environment: Environment
    algorithm: Algorithm
    rollout: Rollout
    trainer: Trainer
    cards: Cards
    journal: Journal
    publish: Callable[[int], tuple[int, int] | None]
    """Both sides hold the same bits after it, as this version, or the run stops; bytes carried, and those to other hosts."""
    phase: Callable[[str], contextlib.AbstractContextManager[None]]
    prompts: int  # of a step
    rounds: int  # of sampling, at most
    mini_batches: int  # of a batch, an update on each
    epochs: int  # passes over a batch
    lr: Callable[[int], float]  # of a step
    policy: align.Policy
    reference: Callable[[Batch], np.ndarray] | None = None
    """The log-probs of all loss rows by the frozen model that the algorithm asks."""
    critic: Critic | None = None  # that the algorithm asks and trains
    keeper: Keeping = field(default_factory=KeepsNothing)  # of batches

    def __call__(self, step: int, show: bool) -> tuple[dict[str, Any], Batch]:
        """Returns the metrics of step `step` (`time/*`: seconds of each phase) and its batch. AlignmentError where a log-prob
        of the first update, the one that is on-policy, differs in a bit and the policy is to fail; the log has the step all
        the same. `show`: keep some of its completions."""
        clock = Clock()
        drawn = self.drawn(step, clock)
        batch = self.packed(drawn.groups, clock, weights_stay=False)
        first, *later = parts(batch, self.mini_batches, self.epochs)
        self.keeper.sampled(step, batch)
        updates = self._train(step, clock, [first])
        compared = Compared(first, updates[0].report.logprobs)
        self.keeper.trained(step, batch, compared.logprobs)
        self.journal.completions(step, drawn.groups, compared, show)
        try:
            mismatch = align.check_batch(first, compared.logprobs, self.policy, step, updates[0].report.by)
        except align.AlignmentError:
            failed = self.journal.measure(step, drawn.groups, batch, updates, compared)
            self.journal.step(step, failed | clock.seconds)
            raise
        updates += self._train(step, clock, later)
        metrics = self.measured(step, drawn, batch, updates, compared) | found(mismatch)
        with clock("publish", of="both"):
            metrics |= sent(self.publish(step))
        return metrics | clock.told(), batch

    def ahead(self) -> dict[str, bytes]:
        """Returns nothing: a checkpoint between two steps needs no more than the weights."""
        return {}

    def off_policy(self, step: int, drawn: Drawn, clock: Clock) -> tuple[list[Update], Batch]:
        """Does the updates of a step whose samples older weights drew; returns them and the batch."""
        batch = self.packed(drawn.groups, clock, weights_stay=False)
        return self._train(step, clock, list(parts(batch, self.mini_batches, self.epochs))), batch

    def measured(
        self, step: int, drawn: Drawn, batch: Batch, updates: Sequence[Update], compared: Compared | None
    ) -> dict[str, Any]:
        """Returns the metrics of a step, but for its seconds."""
        metrics = self.journal.measure(step, drawn.groups, batch, updates, compared) | drawn.metrics()
        metrics["policy/lr"] = self.lr(step)
        metrics |= from_reference(batch) if self.reference else {}
        return metrics | (from_critic(batch, updates) if self.critic else {})

    def drawn(self, step: int, clock: Clock) -> Drawn:
        """Samples and judges the problems of step `step`."""
        with clock("handover", of="both"):
            self.cards.to_rollout()
        return draw_groups(partial(self._draw, step, clock), self.prompts, self.rounds)

    def packed(self, groups: Sequence[Group], clock: Clock, weights_stay: bool) -> Batch:
        """Makes the batch of a step; the trainer has the cards then. `weights_stay`: the engines keep their weights."""
        with clock("handover", of="both"):
            self.cards.to_trainer(weights_stay)
        said = self.ask(groups, clock)
        with clock("score"), self.phase("scoring"):
            return self.algorithm.batch(groups, **said)

    def _draw(self, step: int, clock: Clock, first: int, count: int) -> list[Group]:
        """Samples and judges the next `count` problems of the stream, in the step those from number `first` on."""
        problems = self.stream.take(count)
        requests = self.requests_for(problems, step, first)
        with clock("sample", of="sampler"), self.phase("sampling"):
            transcripts = self.environment.play(requests, self.rollout.generate, problems)
        with clock("score", of="sampler"), self.phase("scoring"):
            return score(problems, transcripts, self.environment)

    def ask(self, groups: Sequence[Group], clock: Clock) -> dict[str, np.ndarray]:
        """Returns what the models beside the policy say of all sampled tokens."""
        said: dict[str, np.ndarray] = {}
        if not self.reference and not self.critic:
            return said
        sampled = pack([s.transcript for group in groups for s in group.samples])
        if self.reference:
            with clock("reference"), self.phase("asking the frozen model"):
                said["reference"] = self.reference(sampled)
        if self.critic:
            with clock("critic"), self.phase("asking the critic"):
                said["values"] = self.trainer.critic_values(sampled)
        return said

    def _train(self, step: int, clock: Clock, batches: Sequence[Batch]) -> list[Update]:
        """Does an update on each of `batches`."""
        with clock("train"), self.phase("training"):
            return [self.update(step, part) for part in batches]

    def update(self, step: int, part: Batch) -> Update:
        """Does one update on `part`, of the critic too where there is one."""
        report, critic = self.trainer.step(part, self.algorithm.loss, self.lr(step)), self.critic
        return Update(part, report, self.trainer.step_critic(part, critic.loss, critic.lr(step)) if critic else None)
