"""Opens the environment that a config names."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rl.config import RunConfig
from rl.data import Source
from rl.environments.environment import Environment
from rl.environments.hosts import Hosts
from rl.environments.single_turn import SingleTurn
from rl.environments.tools import open_tools
from rl.rewards.reward import Reward, open_reward


def open_environment(
    config: RunConfig,
    source: Source,
    hosts: Hosts | None,
    say: Callable[[str], None] = print,
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Environment, Reward | None, str]:
    """Returns the environment, the run's reward and what is said to judge. An environment with a get_reward judges alone where
    the config names no reward, which is then None, and beside it where it does. `say` tells of the first sample that is left
    out; `objects`: rewards of this process, by what the config calls them."""
    own = hosts.about.name if hosts and hosts.about.rewards else ""
    reward = None if own and not config.reward else open_reward(config.reward, source, config.scoring, say, objects)
    name = " + ".join(filter(None, (reward.name if reward else "", f"{own}.get_reward" if own else "")))
    if hosts is None:
        assert reward
        return SingleTurn(source.tokenizer, reward), reward, name
    return open_tools(config, source, reward, hosts, say), reward, name
