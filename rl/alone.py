"""Takes one half of a run alone: sampling without training (`mode=rollout_only`), or training on what a run kept
(`mode=train_only`). The batches lie in a folder between them, so that a step can be looked at from either side.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl import align
from rl.clock import Clock
from rl.config import RunConfig
from rl.errors import UserError
from rl.journal import Compared, compare, found, rewards
from rl.replay import kept
from rl.run.screen import Bar
from rl.step import Step
from rl.updates import measure, parts
from trainer.batch import check_batch_arithmetic


def check_alone(config: RunConfig, vocabulary: int) -> None:
    """Raises UserError where `mode` and `batches` do not fit together, or a batch that is to be trained on is missing or of
    another model."""
    if (config.mode == "train_only") != (config.batches is not None):
        said = "trains on what a run kept: set batches=RUN" if config.batches is None else "does not read batches"
        raise UserError(f"mode={config.mode} {said}")
    older = {"algorithm.lag": config.algorithm.lag, "rollout.carry": config.rollout.carry}
    by = next((name for name, value in older.items() if value), None)
    if by and (config.mode != "full" or config.align.keep_batches):
        key = (
            f"mode={config.mode}" if config.mode != "full" else f"align.keep_batches={list(config.align.keep_batches)}"
        )
        raise UserError(
            f"{key} with {by}={older[by]}: a batch is drawn by older weights than it is trained with, and can be replayed "
            f"with neither; set {by}=0"
        )
    if config.batches is None:
        return
    for step in range(1, config.steps + 1):
        batch = _read(Path(config.batches), step).batch
        if (most := int(batch.token_ids.max())) >= vocabulary:
            raise UserError(
                f"batches={config.batches}: step {step} has token {most}, and the model a vocabulary of {vocabulary}"
            )
        world = config.trainer.world_size
        check_batch_arithmetic(
            batch.sequences // config.algorithm.mini_batches, config.trainer.leaf_sequences, 1, world
        )


def _read(folder: Path, step: int) -> kept.Kept:
    there = folder / kept.BATCHES if (folder / kept.BATCHES).is_dir() else folder
    path = there / f"{step:08}"
    if not path.is_dir():
        raise UserError(
            f"batches={folder}: there is none of step {step} ({path}); align.keep_batches=[{step}] or mode=rollout_only "
            f"keeps it"
        )
    return kept.read(path)


@dataclass(frozen=True)
class Alone:
    """Takes the steps of one half of a run, which are those of `step`."""

    step: Step
    bar: Bar
    steps: int

    def sample(self) -> None:
        """Samples and scores the steps by the first weights, and keeps each batch."""
        self.step.publish(0)
        with self.bar:
            for number in range(1, self.steps + 1):
                clock = Clock()
                drawn = self.step.drawn(number, clock)
                batch = self.step.packed(drawn.groups, clock, weights_stay=True)
                self.step.keeper.sampled(number, batch)
                metrics = {"grpo/step": number} | rewards(drawn.groups) | drawn.metrics() | clock.seconds
                metrics["response/length_mean"] = float(batch.counts.mean())
                self._log(number, metrics, f"reward {metrics['reward/mean']:.3f}  {len(batch.rows):,} tokens sampled")

    def train(self, batches: Path) -> None:
        """Trains on the kept batches, one after another, and compares log-probs as a run does."""
        step = self.step
        step.cards.to_trainer(weights_stay=False)
        with self.bar:
            for number in range(1, self.steps + 1):
                batch, clock = _read(batches, number).batch, Clock()
                with clock("train"):
                    updates = [step.update(number, part) for part in parts(batch, step.mini_batches, step.epochs)]
                first = updates[0]
                apart = compare(Compared(first.batch, first.report.logprobs))
                step.journal.totals.tokens_compared += len(first.batch.rows)
                step.journal.totals.tokens_nonzero += int(apart["divergence/tokens_nonzero"])
                step.keeper.trained(number, batch, first.report.logprobs)
                mismatch = align.check_batch(first.batch, first.report.logprobs, step.policy, number)
                metrics: dict[str, Any] = (
                    {"grpo/step": number} | apart | found(mismatch) | measure(updates) | clock.seconds
                )
                metrics |= {"policy/loss": first.report.loss, "policy/grad_norm": first.report.grad_norm}
                metrics["policy/lr"] = step.lr(number)
                differ = int(apart["divergence/tokens_nonzero"])
                self._log(
                    number,
                    metrics,
                    f"loss {first.report.loss:.3g}  {differ:,} of {len(first.batch.rows):,} tokens differ",
                )

    def _log(self, number: int, metrics: dict[str, Any], said: str) -> None:
        self.step.journal.step(number, metrics)
        self.bar(number, self.steps, said)
