"""Prepares a run: all that can be known, and can be wrong, before a process of it starts or a file is written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from kernels.device import check_cards
from kernels.host.command import warn
from kernels.model import ModelConfig
from rl.alone import check_alone
from rl.carry import check_carry
from rl.cluster.nodes import another_ray, available
from rl.config import RunConfig
from rl.data import Source, open_source
from rl.environments.choice import open_environment, open_hosts
from rl.environments.environment import Environment
from rl.errors import UserError
from rl.evaluation.sets import EvaluationSet, open_sets
from rl.frozen import FrozenModel, check_tokenizer, frozen_model, preference_model
from rl.hosted.asked import HostedModel, check_hosted, hosted_model
from rl.identity import identity
from rl.model import model_config
from rl.out_dir import check_out_dir
from rl.plan import Plan, check_machine, make_plan
from rl.preferences import check_preferences
from rl.resume import check_model, find_start
from rl.rewards.golds import check_golds
from rl.rewards.placed import Placed, PlacedModels
from rl.rewards.section import MODEL
from rl.run.screen import Screen, Waiting
from rl.run.trackers import check_installed


@dataclass(frozen=True)
class Prepared:
    """Holds what was found out of a run before it starts."""

    source: Source
    environment: Environment
    judged_by: str
    model: ModelConfig
    plan: Plan
    identity: dict[str, Any]
    warnings: tuple[str, ...]  # one line each
    frozen: FrozenModel | None = None  # of RL
    paired: FrozenModel | None = None  # of the warm start
    sets: Mapping[str, EvaluationSet] = field(default_factory=dict)  # of `eval.sets`
    hosted: HostedModel | None = None  # what RL asks in the place of `frozen`
    rewards: Mapping[str, Placed] = field(default_factory=dict)  # reward models that wait for their actors, by name


def prepare(
    config: RunConfig, console: Console | None = None, objects: Mapping[str, Any] = MappingProxyType({})
) -> Prepared:
    """Says on `console` what takes long. Raises a BAD_INPUT error. `objects`: rewards and factories of this process, by what
    the config calls them."""
    if config.device == "cpu" and config.kernels.family != "auto":
        raise UserError(
            f"kernels.family={config.kernels.family} is of GPU kernels: set device=cuda, or leave it at auto"
        )
    if config.device == "cuda" and config.cluster.address == "local" and not config.dry_run:
        check_cards()
    for kind in config.logger:
        check_installed(kind)
    check_carry(config)
    models = PlacedModels()
    objects = {**objects, MODEL: models}
    hosts = open_hosts(config, objects)
    source = open_source(config, console, hosts.about if hosts else None)
    check_preferences(config, source.train)
    model = model_config(config, len(source.tokenizer))
    say = console.warn if isinstance(console, Screen) else warn
    sets = open_sets(config, source.tokenizer, source.train, console, say, objects)
    asked = (*source.train, *source.held_out, *(p for one in sets.values() for p in one.problems))
    longest = max(len(p.prompt_ids) for p in asked)
    plan = make_plan(config, model, longest)
    if (frozen := frozen_model(config, model)) and isinstance(frozen.source, str):
        check_tokenizer(frozen.key, frozen.source, source.tokenizer)
    if hosted := hosted_model(config):
        check_hosted(hosted, source.tokenizer, model.vocab_size, longest + config.response_tokens)
    if not config.dry_run:
        check_machine(config, plan, available(config))
        check_out_dir(Path(config.out_dir))
    check_alone(config, model.vocab_size)
    mine = identity(config, source)
    if not config.dry_run:
        check_model(find_start(config, mine, thorough=False), model)
    environment, reward, name = open_environment(config, source, hosts, say, objects)
    golds = ""
    if reward:
        with Waiting(console, f"judging the gold solutions by {reward.name}"):
            golds = check_golds(source, reward, by_tokens=config.model.path is not None)
    of_sets = (f"eval.sets.{name}: {line}" for name, one in sets.items() for line in one.warnings)
    warnings = tuple(filter(None, (another_ray(config), *source.warnings, golds, *of_sets)))
    paired = preference_model(config, model)
    return Prepared(source, environment, name, model, plan, mine, warnings, frozen, paired, sets, hosted, models.found)
