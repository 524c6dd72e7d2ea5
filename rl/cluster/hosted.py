"""Models that transformers computes (`rl.hosted`), each in a Ray actor of its own."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from kernels.host.place import HOST, Place
from rl.cluster.calls import gather
from rl.cluster.nodes import card_names, found, this_node
from rl.cluster.start import named
from rl.cluster.watch import Rank
from rl.config import RunConfig
from rl.errors import UserError
from rl.hosted.asked import HostedModel, is_automatic, needs_cards
from rl.hosted.language_model import LanguageModel
from rl.placement import beside
from rl.rewards.model import RewardModel
from rl.rewards.placed import Placed


class Holder:
    """Holds one model, in its actor."""

    def __init__(self, visible: str | None) -> None:
        """`visible`: the cards that it sees, as CUDA names them; None: those of its node."""
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible  # before torch looks at a card

    def ready(self) -> int:
        """Returns the process id."""
        return os.getpid()

    def load(self, key: str, kind: type, arguments: Mapping[str, Any]) -> str:
        """Loads the model; returns which devices hold it. UserError, which names `key`, for what it cannot load."""
        try:
            self._model = kind(**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"{key}: {error}") from None
        return str(self._model.placed)

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the model."""
        return getattr(self._model, method)(*arguments)


@dataclass(frozen=True)
class Hosted:
    """Asks a model that an actor holds."""

    rank: Rank
    placed: str  # the devices that hold it
    patience: float  # seconds that the actor may be stopped

    def ask(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """Returns what a method of the model returns. RunError where the actor has died, or after `timeout` seconds."""
        return gather({self.rank.actor.call.remote(method, *arguments): self.rank}, timeout, self.patience)[0]


@dataclass(frozen=True)
class Room:
    """Says where an actor runs, and which cards it sees (as CUDA names them; None: all)."""

    host: str = HOST
    options: Mapping[str, Any] = field(default_factory=dict)
    visible: str | None = None


@contextlib.contextmanager
def hosting(
    config: RunConfig, frozen: HostedModel | None, rewards: Mapping[str, Placed], ranks: Iterable[Place]
) -> Iterator[dict[str, Hosted]]:
    """Starts an actor for each model, by the key that asks for it, and lets the rewards ask theirs; ends them on the way out.
    UserError where one cannot be loaded, or there is no room. `ranks`: the places of the run's ranks."""
    threads, held = config.trainer.threads, dict[str, Hosted]()
    wanted: dict[str, tuple[type, dict[str, Any]]] = {
        key: (RewardModel, _everywhere(one.args)) for key, one in rewards.items()
    }
    if frozen:
        about = {"path": frozen.path, "device_map": frozen.device_map, "threads": threads}
        wanted[frozen.key] = (LanguageModel, _everywhere(about))
    actor = ray.remote(num_cpus=0, max_restarts=0)(Holder)
    spread = any(is_automatic(config, arguments["device_map"]) for _, arguments in wanted.values())
    with _left_over(config, list(ranks)) if spread else contextlib.nullcontext(Room()) as over:
        try:
            for key, (kind, arguments) in wanted.items():
                room = over if is_automatic(config, arguments["device_map"]) else _own_node(config)
                rank = Rank(named(key, Place(room.host)), actor.options(**room.options).remote(room.visible))
                held[key] = _begun(rank, key, kind, arguments, config)
            for key, stand_in in rewards.items():
                stand_in.ask = partial(held[key].ask, "__call__", timeout=config.scoring.timeout)
            yield held
        finally:
            for one in held.values():
                with contextlib.suppress(Exception):  # of a Ray that is lost, which the run's own failure says
                    ray.kill(one.rank.actor)


def _everywhere(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Names a folder as another process finds it, whose working folder may be another; what is none is a name on the hub."""
    path = arguments.get("path")
    if isinstance(path, str) and path and Path(path).expanduser().is_dir():
        return {**arguments, "path": str(Path(path).expanduser().absolute())}
    return dict(arguments)


def _begun(rank: Rank, key: str, kind: type, arguments: Mapping[str, Any], config: RunConfig) -> Hosted:
    section = config.cluster
    rank.begun(gather({rank.actor.ready.remote(): rank}, section.timeout, section.patience)[0])
    placed = gather({rank.actor.load.remote(key, kind, arguments): rank}, None, section.patience)[0]
    return Hosted(rank, placed, section.patience)


def _own_node(config: RunConfig) -> Room:
    """Returns the driver's node, with all of its cards."""
    if config.cluster.address == "local":
        return Room()
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Room(found()[0].host, {"scheduling_strategy": here})


@contextlib.contextmanager
def _left_over(config: RunConfig, ranks: list[Place]) -> Iterator[Room]:
    """Reserves the cards that no rank has: of this machine, or of the node of the cluster that has the most."""
    if config.cluster.address == "local":
        taken = {place.card for place in ranks}
        cards = [card for card in this_node(config.device).cards if card not in taken]
        order = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        yield Room(visible=",".join(order[card] if order else str(card) for card in cards))
        return
    node = beside(config, found(), needs_cards(config))
    group = placement_group([{"GPU": len(node.cards), f"node:{node.host}": 0.001}])
    try:
        if not group.wait(config.cluster.timeout):
            raise UserError(
                f"{needs_cards(config)}: Ray did not reserve {len(node.cards)} GPU of node {node.host} beside the "
                f"ranks' within cluster.timeout={config.cluster.timeout:.0f} s; another run may hold them"
            )
        there = {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}
        yield Room(node.host, there, ",".join(card_names(group, config.cluster.timeout)[0]))
    finally:
        with contextlib.suppress(Exception):
            remove_placement_group(group)
