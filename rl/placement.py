"""Which node and which card each process has."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kernels.host.place import Place
from rl.config import RunConfig
from rl.errors import UserError


@dataclass(frozen=True)
class Node:
    """Describes a host that ranks can run on: the address at which the others reach it, its cards and its CPUs."""

    host: str
    cards: tuple[int, ...] = ()
    cpus: int = 1
    memory: int = 0
    """Bytes of host memory that are free; 0 where that is not known."""
    card_bytes: tuple[int, ...] = ()
    """Memory of each card; empty where that is not known."""


@dataclass(frozen=True)
class Share:
    """Counts what runs on one node."""

    trainer: int  # ranks
    engines: int  # each whole


@dataclass(frozen=True)
class Placement:
    """Says where each rank has its tensors."""

    trainer: tuple[Place, ...]
    rollout: tuple[Place, ...]  # engine by engine

    @property
    def hosts(self) -> tuple[str, ...]:
        """Returns the hosts that have a rank, in the order of the trainer's."""
        return tuple(dict.fromkeys(p.host for p in self.trainer + self.rollout))


def choose(config: RunConfig, nodes: Sequence[Node]) -> tuple[Node, ...]:
    """Chooses the nodes of a run: `cluster.nodes` of them, or the fewest that have a card (on a CPU: a core) for every rank;
    where none are enough, and ranks may share, all. Those with the most come first. UserError names what each node has."""
    ordered = sorted(nodes, key=lambda node: -_slots(config, node))
    able = [node for node in ordered if _slots(config, node)]
    asked = config.cluster.nodes
    if not able or (asked and len(able) < asked):
        raise UserError(_too_few(config, ordered, len(able)))
    for count in [asked] if asked else range(1, len(able) + 1):
        slots = [_slots(config, node) for node in able[:count]]
        if _all_have_one(config, slots):
            return tuple(able[:count])
    if config.cluster.placement == "split" and config.device == "cuda":
        raise UserError(_too_small(config, able[:asked]))
    return tuple(able[:asked])


def shares(config: RunConfig, nodes: Sequence[Node]) -> tuple[Share, ...]:
    """Says how much runs on each of the nodes that were chosen. An engine's ranks stay together."""
    slots, tp = [_slots(config, node) for node in nodes], config.rollout.tp
    if config.cluster.placement == "colocated":
        engines = _in_proportion(config.rollout.replicas, [s // tp for s in slots])
        return tuple(map(Share, _in_proportion(config.trainer.world_size, slots), engines))
    needed = config.trainer.world_size + config.rollout.replicas * tp
    for most in range(1, needed + 1):  # as evenly as that goes, with the trainer's ranks side by side
        given = [most if config.device == "cpu" else min(most, s) for s in slots]
        if filled := _filled(config, given):
            return filled
    raise UserError(_too_small(config, nodes))


def place(config: RunConfig, nodes: Sequence[Node], given: Sequence[Share] = ()) -> Placement:
    """Places the ranks on nodes that were chosen, as `given` says (`shares`, if it does not). Colocated ranks go round the
    cards of a node, both kinds from the first one on, and hand their memory to each other; split ones have a card each, the
    trainer's first."""
    trainer: list[Place] = []
    rollout: list[Place] = []
    for node, share in zip(nodes, given or shares(config, nodes), strict=True):
        ranks = share.engines * config.rollout.tp
        begin = share.trainer if config.cluster.placement == "split" else 0
        cards = node.cards if config.device == "cuda" else ()
        trainer += _on(node.host, cards, range(share.trainer))
        rollout += _on(node.host, cards, range(begin, begin + ranks))
    return Placement(tuple(trainer), tuple(rollout))


def cards_of(config: RunConfig, node: Node, share: Share) -> int:
    """Counts the cards of a node that its ranks have; on a CPU the ranks."""
    trainer, rollout = share.trainer, share.engines * config.rollout.tp
    count = trainer + rollout if config.cluster.placement == "split" else max(trainer, rollout)
    return min(count, len(node.cards)) if config.device == "cuda" else count


def beside(config: RunConfig, nodes: Sequence[Node], asked: str) -> Node:
    """Finds the node with the most cards that no rank has, and these alone. UserError, which begins with what `asked`, where
    none has any."""
    chosen = choose(config, nodes)
    taken = {n.host: cards_of(config, n, s) for n, s in zip(chosen, shares(config, chosen), strict=True)}
    left = [replace(n, cards=n.cards[taken.get(n.host, 0) :], card_bytes=()) for n in nodes]
    most = max(left, key=lambda node: len(node.cards))
    if most.cards:
        return most
    raise UserError(
        f"{asked} spreads a model over the cards that no rank has, and there are none ({_have(config, nodes)}): name devices "
        f"(cpu; cuda:0 of the driver's node, which it then shares), or lower trainer.world_size, rollout.tp or rollout.replicas"
    )


def _on(host: str, cards: Sequence[int], numbers: Iterable[int]) -> list[Place]:
    return [Place(host, cards[i % len(cards)] if cards else None) for i in numbers]


def _slots(config: RunConfig, node: Node) -> int:
    return len(node.cards) if config.device == "cuda" else max(1, node.cpus)


def _all_have_one(config: RunConfig, slots: Sequence[int]) -> bool:
    """Whether every rank of a kind (colocated), or every rank (split), has a card to itself."""
    if config.cluster.placement == "split":
        return _filled(config, slots) is not None
    engines = sum(s // config.rollout.tp for s in slots)
    return config.trainer.world_size <= sum(slots) and config.rollout.replicas <= engines


def _filled(config: RunConfig, slots: Sequence[int]) -> tuple[Share, ...] | None:
    """Fills the nodes one after the other, the trainer's ranks first; None where that is too much."""
    trainer, engines, found = config.trainer.world_size, config.rollout.replicas, []
    for s in slots:
        ranks = min(trainer, s)
        whole = min(engines, (s - ranks) // config.rollout.tp)
        found.append(Share(ranks, whole))
        trainer, engines = trainer - ranks, engines - whole
    return None if trainer or engines else tuple(found)


def _in_proportion(count: int, weights: Sequence[int]) -> list[int]:
    """Parts of `count`, in proportion to the weights; none is above its weight as long as the sum is not."""
    weights = weights if any(weights) else [1] * len(weights)
    parts = [0] * len(weights)
    for _ in range(count):
        able = (i for i, w in enumerate(weights) if w)
        parts[min(able, key=lambda i: ((parts[i] + 1) / weights[i], i))] += 1
    return parts


def _too_few(config: RunConfig, nodes: Sequence[Node], able: int) -> str:
    asked = config.cluster.nodes or 1
    if config.cluster.address == "local":
        if config.device == "cuda" and not able:
            return "device=cuda: this machine has no CUDA device; use device=cpu, or dry_run=true for the plan"
        return f"cluster.nodes={asked}: cluster.address=local is one node; give the address of a Ray cluster"
    kind = " with a card" if config.device == "cuda" else ""
    return (
        f"cluster.nodes={asked}: Ray at cluster.address={config.cluster.address} has {able} node(s){kind} "
        f"({_have(config, nodes)}): start Ray on more, or lower it"
    )


def _too_small(config: RunConfig, nodes: Sequence[Node]) -> str:
    trainer, rollout = config.trainer.world_size, config.rollout.replicas * config.rollout.tp
    asked = (
        f"cluster.placement=split needs {trainer + rollout} cards (trainer.world_size={trainer} + "
        f"rollout.replicas x rollout.tp={rollout})"
    )
    change = "lower them, or set cluster.placement=colocated"
    if config.cluster.address == "local":
        return f"{asked} and this machine has {_slots(config, nodes[0])}: {change}"
    return f"{asked}, an engine's on one node, and {_have(config, nodes)}: {change}"


def _have(config: RunConfig, nodes: Sequence[Node]) -> str:
    kind = "card(s)" if config.device == "cuda" else "core(s)"
    return ", ".join(f"{node.host} has {_slots(config, node)} {kind}" for node in nodes)
