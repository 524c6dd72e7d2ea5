"""Teaches by pairs of answers, of which one was chosen (Rafailov et al. 2023, "DPO", arXiv 2305.18290): a warm start.

A row of the data set holds both answers beside its question. The reference is the weights that the warm start begins with.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from rl.config import RunConfig, WarmupSection
from rl.data import WARMUP, Problem, Source
from rl.data.fields import is_conversation, value_at
from rl.errors import UserError
from rl.pack import pack_supervised
from trainer.batch import Batch, StepReport
from trainer.loss import Loss, PreferenceLoss


class Reference(Protocol):
    """Declares what is asked of the trainer beside its steps."""

    def frozen_logprobs(self, batch: Batch) -> np.ndarray:
        """Returns the initial weights' log-probs of all loss rows."""


class Preferences:
    """Draws the batches of the warm start: a function of the seed and the step, from where `cursor` is."""

    def __init__(
        self, section: WarmupSection, source: Source, seed: int, longest: int, cursor: int, trainer: Reference
    ) -> None:
        """`longest`: tokens of an answer that are shown."""
        self.section, self.source, self.longest, self.trainer = section, source, longest, trainer
        self.stream = source.stream(seed, WARMUP)
        self.stream.cursor = cursor

    @property
    def loss(self) -> Loss:
        """Returns the loss of pairs."""
        return PreferenceLoss(self.section.beta)

    def batch(self, step: int) -> Batch:
        """Draws the next pairs of the stream: the chosen answer of each, then the rejected one."""
        pairs = self.section.sequences // 2
        shown = []
        for problem in self.stream.take(pairs):
            for text in pair_of(self.section, problem):
                shown.append((problem, self.source.tokenizer.completion(text)[: self.longest]))
        batch = pack_supervised(shown)
        batch = replace(batch, weights=np.full(len(batch.rows), 1.0 / pairs, dtype=np.float32))
        return replace(batch, reference=self.trainer.frozen_logprobs(batch))

    def measure(self, batch: Batch, report: StepReport) -> dict[str, float]:
        """Says how the policy ranked the pairs before the step: the share that it ranked as they were chosen, and the mean of h
        (`trainer.loss.PreferenceLoss`)."""
        d = report.logprobs.astype(np.float64) - batch.reference.astype(np.float64)
        margins = np.bincount(batch.sequence, d, minlength=batch.sequences)
        h = self.section.beta * (margins[0::2] - margins[1::2])
        return {"preference/accuracy": float((h > 0).mean()), "preference/margin": float(h.mean())}


def pair_of(section: WarmupSection, problem: Problem) -> tuple[str, str]:
    """Returns the chosen and the rejected answer of a row; UserError where one is not there."""
    chosen, rejected = (
        _text(problem, name, key) for name, key in ((section.chosen, "chosen"), (section.rejected, "rejected"))
    )
    if chosen == rejected:
        raise UserError(f"{problem.id}: the chosen and the rejected answer are the same text: a pair must differ")
    return chosen, rejected


def _text(problem: Problem, field: str, key: str) -> str:
    value = value_at(problem.record, field)
    if is_conversation(value):
        value = value[-1].get("content")
    if not isinstance(value, str):
        raise UserError(f"{problem.id}: no text field {field!r}, which warmup.{key} names")
    return value


def check_preferences(config: RunConfig, train: Sequence[Problem]) -> None:
    """Raises UserError where the keys or a row do not make pairs."""
    section = config.warmup
    if not section.steps or section.kind != "dpo":
        return
    if config.data.kind != "dataset":
        raise UserError(
            f"warmup.kind=dpo with data.kind={config.data.kind}: its rows must hold pairs; set data=dataset"
        )
    for problem in train:
        pair_of(section, problem)
