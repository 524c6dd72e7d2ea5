"""Stands for the reward models that are placed by `device_map`, until actors of the run have them."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from rl.errors import UserError
from rl.hosted.loading import check_device_map
from rl.rewards.section import MODEL, RewardSection


class Placed:
    """Calls a reward model where it is, as TRL calls one."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self.args = args
        self.ask: Callable[[list[Any], list[Any]], list[float]] | None = None
        """Asks the model, once it is there."""

    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[float]:
        """Returns the scores of the completions of one problem."""
        assert self.ask is not None
        return self.ask(prompts, completions)


class PlacedModels:
    """Collects those that the rewards of a run and of its sets name; what is named alike is one model."""

    def __init__(self) -> None:
        self.found: dict[str, Placed] = {}
        """By what a message calls them."""

    def of(self, reward: RewardSection) -> Placed:
        """Returns what stands for the model. UserError where its `device_map` is none."""
        try:
            check_device_map(reward.args["device_map"])
        except ValueError as error:
            raise UserError(f"reward={MODEL}: device_map: {error}") from None
        return self.found.setdefault(f"reward={MODEL} {json.dumps(reward.args)}", Placed(reward.args))


def is_placed(reward: RewardSection) -> bool:
    """Tells whether a reward is a model that is placed by `device_map`."""
    return reward.function == MODEL and reward.args.get("device_map") is not None
