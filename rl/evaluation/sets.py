"""Opens the further sets that a run is evaluated on: their problems, and what judges them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rich.console import Console

from rl.config import FileSet, RunConfig, TaskSet
from rl.data import Problem
from rl.data.section import DatasetSection
from rl.data.sources import open_set
from rl.errors import UserError
from rl.rewards.golds import check_golds
from rl.rewards.reward import Reward, open_reward
from rollout.tokenizer import Tokenizer


@dataclass(frozen=True)
class EvaluationSet:
    """Holds the problems of one set of `eval.sets`, and what judges them."""

    problems: Sequence[Problem]
    reward: Reward
    samples: int  # of each problem
    marker: str | None  # before what a completion states; None: what is boxed, or all of it
    plain: bool  # a completion states its whole text
    warnings: tuple[str, ...]


def open_sets(
    config: RunConfig,
    tokenizer: Tokenizer,
    trained: Sequence[Problem],
    console: Console | None = None,
    say: Callable[[str], None] = print,
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, EvaluationSet]:
    """Opens every set of `config.eval`, in the order given. UserError, which names the set, for one that cannot be read or
    judged. `trained`: problems that a run sees; what stands in both is warned of. `say`, `objects` as of `open_reward`."""
    found = {}
    for name, section in config.eval.sets.items():
        try:
            found[name] = _open(config, section, tokenizer, trained, console, say, objects)
        except UserError as error:
            raise UserError(f"eval.sets.{name}: {error}") from None
    return found


def _open(
    config: RunConfig,
    section: TaskSet | FileSet,
    tokenizer: Tokenizer,
    trained: Sequence[Problem],
    console: Console | None,
    say: Callable[[str], None],
    objects: Mapping[str, Any],
) -> EvaluationSet:
    rewards = config.reward if section.reward is None else section.reward
    source = open_set(config, section, rewards, tokenizer, console)
    reward = open_reward(rewards, source, config.scoring, say, objects)
    golds = check_golds(source, reward, by_tokens=config.model.path is not None)
    seen = {p.prompt for p in trained}
    both = sum(p.prompt in seen for p in source.held_out)
    twice = f"{both} of {len(source.held_out)} problems are trained on too" if both else ""
    return EvaluationSet(
        problems=source.held_out,
        reward=reward,
        samples=section.samples or config.eval.samples,
        marker=section.marker if isinstance(section, DatasetSection) else None,
        plain=not isinstance(section, DatasetSection),
        warnings=tuple(filter(None, (*source.warnings, golds, twice))),
    )
