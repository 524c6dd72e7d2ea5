"""Prepares a run: all that can be known, and can be wrong, before a process of it starts or a file is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from kernels.host.command import warn
from kernels.model import ModelConfig
from rl.config import RunConfig
from rl.data import Source, open_source
from rl.frozen import FrozenModel, check_tokenizer, frozen_model, preference_model
from rl.identity import identity
from rl.model import model_config
from rl.out_dir import check_out_dir
from rl.plan import Plan, check_machine, make_plan
from rl.preferences import check_preferences
from rl.resume import check_model, find_start
from rl.rewards.golds import check_golds
from rl.rewards.reward import Reward, open_reward
from rl.run.screen import Screen, Waiting
from rl.run.trackers import check_installed


@dataclass(frozen=True)
class Prepared:
    """Holds what was found out of a run before it starts."""

    source: Source
    reward: Reward
    model: ModelConfig
    plan: Plan
    identity: dict[str, Any]
    warnings: tuple[str, ...]  # one line each
    frozen: FrozenModel | None  # of RL
    paired: FrozenModel | None  # of the warm start


def prepare(
    config: RunConfig, console: Console | None = None, objects: Mapping[str, Any] = MappingProxyType({})
) -> Prepared:
    """Says on `console` what takes long. Raises a BAD_INPUT error. `objects`: rewards that are called in this process, by what
    the config calls them."""
    for kind in config.logger:
        check_installed(kind)
    source = open_source(config, console)
    check_preferences(config, source.train)
    model = model_config(config, len(source.tokenizer))
    longest = max(len(p.prompt_ids) for p in (*source.train, *source.held_out))
    plan = make_plan(config, model, longest)
    if frozen := frozen_model(config, model):
        check_tokenizer(frozen, source.tokenizer)
    if not config.dry_run:
        check_machine(config, plan)
        check_out_dir(Path(config.out_dir))
    mine = identity(config, source)
    if not config.dry_run:
        check_model(find_start(config, mine, thorough=False), model)
    say = console.warn if isinstance(console, Screen) else warn
    reward = open_reward(config.reward, source, config.scoring, say, objects)
    with Waiting(console, f"judging the gold solutions by {reward.name}"):
        golds = check_golds(source, reward, by_tokens=config.model.path is not None)
    warnings = tuple(filter(None, (*source.warnings, golds)))
    return Prepared(source, reward, model, plan, mine, warnings, frozen, preference_model(config, model))
