"""Plays the conversations of an evaluation, in the environment that the policy is trained in, and measures them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from rich.console import Console

from rl.config import DatasetSection, MixtureSection, RunConfig
from rl.data import Problem, Source
from rl.environments.environment import Environment, Generate, score
from rl.errors import UserError
from rl.evaluation.measures import Evaluation, Stated, measure
from rl.evaluation.samples import write_samples
from rl.requests import eval_sampling, requests_for
from rl.run.screen import Waiting
from rl.samples import Group
from rollout.sampling import Request

Keep = Callable[[int, Sequence[Group]], None]
"""Keeps the samples of the evaluation after a step."""


class Cards(Protocol):
    """Declares what an evaluation asks of those who share the cards."""

    def to_rollout(self) -> None:
        """Gives the cards to the engines."""


class Evaluator:
    """Samples the same conversations for each problem, always with the same seeds; says what they earn, and by what."""

    def __init__(
        self,
        problems: Sequence[Problem],
        requests: Sequence[Request],
        environment: Environment,
        judged_by: str,
        stated: Stated = str.strip,
        keep: Keep | None = None,
    ) -> None:
        """`requests`: as many for each problem, side by side."""
        self.problems, self.requests, self.environment, self.judged_by = problems, requests, environment, judged_by
        self.stated, self.keep = stated, keep

    def __call__(
        self, step: int, generate: Generate, cards: Cards, compare: Callable[[], None], console: Console
    ) -> Evaluation:
        """Evaluates what the policy is after `step` steps. `compare` raises where what the engines sample from is not what the
        trainer has."""
        with Waiting(console, f"evaluating on {len(self.problems):,} held-out problems"):
            cards.to_rollout()
            compare()
            transcripts = self.environment.play(self.requests, generate, self.problems)
        groups = score(self.problems, transcripts, self.environment)
        if self.keep:
            self.keep(step, groups)
        found = measure(groups, self.stated)
        if not found.samples:
            why = next((f", first: {s.error}" for g in groups for s in g.samples if s.error), "")
            raise UserError(f"an evaluation in which no completion is judged: {self.judged_by} leaves all out{why}")
        console.print(
            f"held-out {found.told()}, by {self.judged_by}; temperature {self.requests[0].sampling.temperature})",
            soft_wrap=True,
        )
        return found


def make_evaluator(
    config: RunConfig, source: Source, environment: Environment, judged_by: str, keep: Keep | None = None
) -> Evaluator:
    """Makes the evaluation of a run: `config.eval` says of how many problems and samples. `keep`: where the samples go; without
    it, into `out_dir` where the config asks for them."""
    section = config.eval
    problems = source.held_out[: section.problems]
    sampling = eval_sampling(section, config.rollout.max_new_tokens, source.tokenizer.ends)
    requests = requests_for(problems, section.samples, sampling, config.seed, "eval", 0)
    if keep is None and section.keep_samples:
        keep = partial(_kept, Path(config.out_dir) / "evaluations")
    return Evaluator(problems, requests, environment, judged_by, stated_by(config), keep)


def _kept(folder: Path, step: int, groups: Sequence[Group]) -> None:
    write_samples(folder / f"{step:08}.jsonl", groups)


def stated_by(config: RunConfig) -> Stated:
    """Returns what tells the answer that a completion to the run's problems states."""
    sections = config.data.sources.values() if isinstance(config.data, MixtureSection) else (config.data,)
    markers = {section.marker for section in sections if isinstance(section, DatasetSection)}
    if not markers:
        return str.strip
    from rl.rewards.answer import stated  # not for data that has its own verifier: it takes a second

    return partial(stated, marker=markers.pop() if len(markers) == 1 else None)
