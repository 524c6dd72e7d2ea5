"""Plays the conversations of an evaluation, in the environment that the policy is trained in, and measures them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from rl.config import RunConfig
from rl.data import Problem, Source
from rl.data.section import DatasetSection, MixtureSection
from rl.environments.environment import Environment, Generate, score
from rl.errors import UserError
from rl.evaluation.measures import Evaluation, Stated, measure
from rl.evaluation.samples import write_samples
from rl.evaluation.sets import EvaluationSet
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
        name: str = "",
    ) -> None:
        """`requests`: as many for each problem, side by side. `name`: of the set; "" is the data's held-out part."""
        self.problems, self.requests, self.environment, self.judged_by = problems, requests, environment, judged_by
        self.stated, self.keep, self.name = stated, keep, name

    def __call__(
        self, step: int, generate: Generate, cards: Cards, compare: Callable[[], None], console: Console
    ) -> Evaluation:
        """Evaluates what the policy is after `step` steps. `compare` raises where what the engines sample from is not what the
        trainer has."""
        what = f"problems of {self.name}" if self.name else "held-out problems"
        with Waiting(console, f"evaluating on {len(self.problems):,} {what}"):
            cards.to_rollout()
            compare()
            transcripts = self.environment.play(self.requests, generate, self.problems)
        groups = score(self.problems, transcripts, self.environment)
        if self.keep:
            self.keep(step, groups)
        found = measure(groups, self.stated)
        if not found.samples:
            why = next((f", first: {s.error}" for g in groups for s in g.samples if s.error), "")
            where = f" of {self.name}" if self.name else ""
            raise UserError(
                f"an evaluation{where} in which no completion is judged: {self.judged_by} leaves all out{why}"
            )
        console.print(
            f"{self.name or 'held-out'} {found.told()}, by {self.judged_by}; temperature "
            f"{self.requests[0].sampling.temperature})",
            soft_wrap=True,
        )
        return found


class Evaluators:
    """Evaluates on the data's held-out problems, and then on every further set."""

    def __init__(self, own: Evaluator, sets: Mapping[str, Evaluator]) -> None:
        self.own, self.sets = own, sets

    def __call__(self, step: int, **with_what: Any) -> Evaluation:
        """Does what each evaluator does; returns what the first found, with what the others found beside it."""
        found = self.own(step, **with_what)
        return replace(found, sets={name: one(step, **with_what) for name, one in self.sets.items()})


def make_evaluator(
    config: RunConfig, source: Source, environment: Environment, judged_by: str, keep: Keep | None = None
) -> Evaluator:
    """Makes the evaluation of a run: `config.eval` says of how many problems and samples. `keep`: where the samples go; without
    it, into `out_dir` where the config asks for them."""
    problems = source.held_out[: config.eval.problems]
    requests = _requests(config, problems, config.eval.samples, source.tokenizer.ends)
    keep = keep or _keep(config, "evaluations")
    return Evaluator(problems, requests, environment, judged_by, stated_by(config), keep)


def make_set_evaluator(
    config: RunConfig,
    name: str,
    of: EvaluationSet,
    ends: Sequence[int],
    environment: Environment,
    keep: Keep | None = None,
) -> Evaluator:
    """Makes the evaluation on one further set, in an `environment` that is judged by the set's own reward. Its samples have the
    seeds that they would have if it were the data of a run."""
    problems = of.problems[: config.eval.problems]
    requests = _requests(config, problems, of.samples, ends)
    stated = str.strip if of.plain else _marked(of.marker)
    keep = keep or _keep(config, f"evaluations/{name}")
    return Evaluator(problems, requests, environment, environment.judged_by, stated, keep, name)


def _requests(config: RunConfig, problems: Sequence[Problem], samples: int, ends: Sequence[int]) -> list[Request]:
    sampling = eval_sampling(config.eval, config.rollout.max_new_tokens, ends)
    return requests_for(problems, samples, sampling, config.seed, "eval", 0)


def _keep(config: RunConfig, folder: str) -> Keep | None:
    return partial(_kept, Path(config.out_dir) / folder) if config.eval.keep_samples else None


def _kept(folder: Path, step: int, groups: Sequence[Group]) -> None:
    write_samples(folder / f"{step:08}.jsonl", {"": groups})


def stated_by(config: RunConfig) -> Stated:
    """Returns what tells the answer that a completion to the run's problems states."""
    sections = config.data.sources.values() if isinstance(config.data, MixtureSection) else (config.data,)
    markers = {section.marker for section in sections if isinstance(section, DatasetSection)}
    if not markers:
        return str.strip
    return _marked(markers.pop() if len(markers) == 1 else None)


def _marked(marker: str | None) -> Stated:
    from rl.rewards.answer import stated  # not for data that has its own verifier: it takes a second

    return partial(stated, marker=marker)
