"""Draws the samples of later steps while earlier ones are trained on: `algorithm.lag`.

    step s trains on samples that were drawn by the weights after step max(0, s - 1 - lag)

Counters decide that, and never the clock. A step trains on what is ready, while the engines draw for `lag` steps later; then
both sides meet, and the new weights are published. So the hash of a run depends on neither the speed of either side nor on
whether they work at once (cluster.placement=split) or in turn. The ratio of the loss is exp(trainer now - sampler then), and
its denominator is exact.

What proves that: every `align.every`-th step's samples get a further forward pass with the weights that drew them, before
these are trained on. In turn the trainer still has them; at once it keeps a rounded copy, and asks it in the next step, while
the engines draw on. The price is that forward pass and, at once, the copy.

Where samples may be carried over (`carry.py`), what a step drew is not what it trains on: the former is compared, the latter is
told of.
"""

import pickle
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from rl import align
from rl.carry import FILE as CARRIED
from rl.carry import Carrying, Pool, Taken
from rl.clock import Clock, Span
from rl.dynamic_sampling import Drawn
from rl.errors import UserError
from rl.journal import Compared, found
from rl.metrics import Mismatch
from rl.pack import pack
from rl.resume import Start
from rl.step import Step, sent
from trainer.batch import Batch

FILE = "ahead.pickle"
"""Name of the file of a checkpoint that holds the samples of the steps after it."""


@dataclass(frozen=True)
class Ahead:
    """Holds the samples of a step that is still to be trained on."""

    drawn: Drawn
    seconds: dict[str, float]  # of each phase of drawing them
    logprobs: np.ndarray | None = None  # the trainer's, by the weights that drew them; None: not compared
    mismatch: Mismatch | None = None  # where the run went on

    def batch(self) -> Batch | None:
        """Packs what the weights of the step drew; None where that is nothing."""
        transcripts = self.drawn.transcripts()
        return pack(transcripts) if transcripts else None


class Lagging:
    """Takes the steps of a run whose sampling is `lag` steps ahead, or carries samples over, by the parts of a `Step`."""

    def __init__(
        self,
        step: Step,
        lag: int,
        every: int,
        last: int | None,
        at_once: bool,
        ready: Mapping[int, Ahead] | None,
        carrying: Carrying | None = None,
    ) -> None:
        """`every`: steps between those that are compared. `last`: the last step that is drawn; None: as many as are asked
        for. `at_once`: the two sides have memory of their own. `ready`: what a checkpoint holds. `carrying`: draws the steps
        where samples may be carried over."""
        self.step, self.publish, self._carrying = step, step.publish, carrying
        self._lag, self._every, self._last, self._at_once = lag, every, last, at_once and lag > 0
        self._ready = dict(ready or {})
        self._remembered: int | None = None  # the step whose samples the remembered weights drew

    def __call__(self, step: int, show: bool) -> tuple[dict[str, Any], Batch]:
        """Returns the metrics of step `step` and its batch. AlignmentError, before they are trained on, where a log-prob of
        its samples, or of a later step's, is not the trainer's by the weights that drew them and the policy is to fail."""
        clock, ahead = Clock(), step + self._lag
        if self._at_once:
            self._draw_all(range(step, ahead), clock)
            drawing = _Drawing(partial(self._draw, ahead, clock.spans)) if self._wanted(ahead) else None
            self._prove_remembered(clock)
            if drawing and self._compared(ahead):
                self.step.trainer.remember()
                self._remembered = ahead
        else:
            self._draw_all(range(step, ahead + 1), clock)
            drawing = None
        metrics, batch = self._learn(step, clock, show)
        if drawing:
            with clock("wait", of="none"):
                self._ready[ahead] = drawing.result()
        with clock("publish", of="both"):
            metrics |= sent(self.publish(step))
        return metrics | _added(metrics, clock.seconds) | clock.whole(), batch

    def ahead(self) -> dict[str, bytes]:
        """Returns what a checkpoint needs beside the weights, by file name. The trainer has the cards."""
        self._prove_remembered(Clock())
        carried = {CARRIED: pickle.dumps(self._carrying.pool)} if self._carrying else {}
        return {FILE: pickle.dumps(self._ready)} | carried

    def _learn(self, step: int, clock: Clock, show: bool) -> tuple[dict[str, Any], Batch]:
        """Trains on the samples of a step."""
        mine = self._ready.pop(step)
        updates, batch = self.step.off_policy(step, mine.drawn, clock)
        compared = None if mine.logprobs is None else Compared(batch, mine.logprobs)
        if self._carrying:
            assert isinstance(mine.drawn, Taken)
            compared = self._carrying.compared(mine.drawn, mine.logprobs, batch)
        if compared:
            self.step.journal.completions(step, mine.drawn.groups, compared, show)
        metrics = self.step.measured(step, mine.drawn, batch, updates, compared)
        return metrics | found(mine.mismatch) | mine.seconds, batch

    def _wanted(self, step: int) -> bool:
        return step not in self._ready and (self._last is None or step <= self._last)

    def _compared(self, step: int) -> bool:
        return (step - 1) % self._every == 0

    def _draw_all(self, steps: range, clock: Clock) -> None:
        """Draws what is missing of `steps`, and compares it with the trainer, which has the same weights still."""
        missing = [number for number in steps if self._wanted(number)]
        for number in missing:
            self._ready[number] = self._draw(number, clock.spans)
        with clock("handover", of="both"):
            self.step.cards.to_trainer(weights_stay=False)
        for number in filter(self._compared, missing):
            self._prove(number, self.step.trainer.logprobs, clock)

    def _draw(self, step: int, spans: list[Span]) -> Ahead:
        """`spans`: of the step in which that is done."""
        clock = Clock(spans)
        return Ahead((self._carrying or self.step).drawn(step, clock), clock.seconds)

    def _prove_remembered(self, clock: Clock) -> None:
        """Compares the samples that were drawn while the last step was trained."""
        if self._remembered is not None:
            number, self._remembered = self._remembered, None
            self._prove(number, self.step.trainer.past_logprobs, clock)

    def _prove(self, step: int, ask: Callable[[Batch], np.ndarray], clock: Clock) -> None:
        batch = self._ready[step].batch()
        if batch is None:
            return
        with clock("prove"), self.step.phase("comparing"):
            logprobs = ask(batch)
        mismatch = align.check_batch(batch, logprobs, self.step.policy, step)
        self._ready[step] = replace(self._ready[step], logprobs=logprobs, mismatch=mismatch)


def _added(metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, float]:
    """Adds the seconds of a step's phases to those of drawing its samples, where these are not of one side alone."""
    return {name: value + metrics.get(name, 0.0) for name, value in seconds.items()}


class _Drawing(threading.Thread):
    """Draws in a thread. Nobody waits for it where a run fails: its processes are ended, and it with them."""

    def __init__(self, draw: Callable[[], Ahead]) -> None:
        super().__init__(name="sampling ahead", daemon=True)
        self._draw, self._drawn, self._error = draw, list[Ahead](), list[BaseException]()
        self.start()

    def run(self) -> None:
        try:
            self._drawn.append(self._draw())
        except BaseException as error:  # raised where the result is asked for
            self._error.append(error)

    def result(self) -> Ahead:
        """Returns what was drawn, once it is; raises what drawing raised."""
        self.join()
        for error in self._error:
            raise error
        return self._drawn[0]


def drawn_ahead(begin: Start) -> dict[int, Ahead]:
    """Returns what `Lagging.ahead` wrote into the checkpoint that a run begins at; nothing before its first step. UserError
    where it holds anything but plain data."""
    return _held(begin, FILE) or {}


def carried(begin: Start) -> Pool | None:
    """Returns, likewise, the samples that were carried over it."""
    return _held(begin, CARRIED)


def _held(begin: Start, name: str) -> Any:
    if begin.checkpoint is None or not begin.progress.step:
        return None
    path = begin.checkpoint.folder / name
    try:
        with open(path, "rb") as file:
            return _Plain(file).load()
    except (pickle.UnpicklingError, AttributeError, ImportError, EOFError, TypeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


class _Plain(pickle.Unpickler):
    """Makes objects of these classes alone: a checkpoint cannot run code."""

    _ROOMS: ClassVar = (
        "rl.lag",
        "rl.dynamic_sampling",
        "rl.samples",
        "rl.metrics",
        "rl.data.problem",
        "rollout.sampling",
    )
    _PLAIN: ClassVar[dict[str, tuple[str, ...]]] = {
        "builtins": ("bytearray", "complex", "frozenset", "set"),
        "collections": ("OrderedDict",),
        "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
        "decimal": ("Decimal",),
        "fractions": ("Fraction",),
        "numpy": ("dtype", "ndarray"),
        "numpy._core.multiarray": ("_reconstruct", "scalar"),
        "numpy._core.numeric": ("_frombuffer",),
        "numpy.core.multiarray": ("_reconstruct", "scalar"),
        "numpy.core.numeric": ("_frombuffer",),
        "rl.carry": ("Part", "Pool", "Taken", "Unfinished"),
        "rl.environments.conversation": ("Outcome", "Played"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self._PLAIN.get(module, ()) or (module in self._ROOMS and "." not in name and name[0].isupper()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is no plain data")
