"""Opens the environment that a config names."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rl.config import RunConfig
from rl.data import Problem, Source
from rl.data.section import NumberedSection
from rl.environments.environment import Environment
from rl.environments.hosts import Hosts
from rl.environments.single_turn import SingleTurn
from rl.environments.tools import open_tools
from rl.environments.verifiers.host import Setting, VerifiersHost, check_installed
from rl.environments.verifiers.play import open_verifiers
from rl.errors import UserError
from rl.rewards.reward import Reward, open_reward
from rollout.tokenizer import Tokenizer

AnyHosts = Hosts | VerifiersHost


def open_hosts(config: RunConfig, objects: Mapping[str, Any]) -> AnyHosts | None:
    """Imports the environment that the config names; None where each conversation is one turn. `objects`: factories of this
    process, by what the config calls them."""
    section = config.environment
    if section.name == "single_turn":
        if section.factory is not None:
            raise UserError(f"environment.factory={section.factory!r} is set: set environment.name=tools too")
        return None
    if section.factory is None:
        raise UserError(
            "environment.name=tools needs environment.factory=module:Class or path/to/file.py:Class"
            if section.name == "tools"
            else "environment.name=verifiers needs environment.factory=ID, an environment of that package that is installed"
        )
    if section.name == "tools":
        return Hosts(
            section.factory, section.args, config.scoring.workers, section.timeout, objects.get(section.factory)
        )
    check_installed()
    if not isinstance(config.data, NumberedSection) or config.eval.sets:
        raise UserError("environment.name=verifiers has tasks of its own: set data=numbered, and no eval.sets")
    return VerifiersHost(
        section.factory, Setting(section.args, config.data.problems, section.max_turns, section.timeout)
    )


def open_environment(
    config: RunConfig,
    source: Source,
    hosts: AnyHosts | None,
    say: Callable[[str], None] = print,
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Environment, Reward | None, str]:
    """Returns the environment, the run's reward and what is said to judge. An environment with a get_reward judges alone where
    the config names no reward, which is then None, and beside it where it does. `say` tells of the first sample that is left
    out; `objects`: rewards of this process, by what the config calls them."""
    alone = hosts and hosts.about.rewards and not config.reward
    reward = None if alone else open_reward(config.reward, source, config.scoring, say, objects)
    environment = _opened(config, source.tokenizer, source.train, reward, hosts, say)
    return environment, reward, environment.judged_by


def set_environment(
    config: RunConfig,
    name: str,
    problems: Sequence[Problem],
    reward: Reward,
    tokenizer: Tokenizer,
    hosts: AnyHosts | None,
    say: Callable[[str], None] = print,
) -> Environment:
    """Returns the environment of the set `name` of `eval.sets`: the run's, judged by the set's `reward`, or by the environment
    alone where neither the set nor the run names one."""
    alone = hosts and hosts.about.rewards and not (config.reward or config.eval.sets[name].reward)
    return _opened(config, tokenizer, problems, None if alone else reward, hosts, say)


def _opened(
    config: RunConfig,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward | None,
    hosts: AnyHosts | None,
    say: Callable[[str], None],
) -> Environment:
    if hosts is None:
        assert reward
        return SingleTurn(tokenizer, reward)
    if isinstance(hosts, VerifiersHost):
        return open_verifiers(config, tokenizer, problems, reward, hosts, say)
    return open_tools(config, tokenizer, problems, reward, hosts, say)
