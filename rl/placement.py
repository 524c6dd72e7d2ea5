"""Which card each process has."""

from collections.abc import Iterable
from dataclasses import dataclass

from kernels.host.place import HOST, Place
from rl.config import RunConfig
from rl.errors import UserError


@dataclass(frozen=True)
class Placement:
    """Says where each rank has its tensors."""

    trainer: tuple[Place, ...]
    rollout: tuple[Place, ...]  # engine by engine


def place(config: RunConfig, cards: int) -> Placement:
    """Places the ranks on a machine with so many cards. Colocated ranks go round them, both kinds from card 0 on, and hand
    their memory to each other; split ones have a card each, the trainer's first. UserError where there is none, or a split
    needs more."""
    trainer, rollout = config.trainer.world_size, config.rollout.replicas * config.rollout.tp
    if config.device == "cpu":
        return Placement((Place(HOST),) * trainer, (Place(HOST),) * rollout)
    if not cards:
        raise UserError("device=cuda: this machine has no CUDA device; use device=cpu, or dry_run=true for the plan")
    if config.cluster.placement == "colocated":
        return Placement(_on(w % cards for w in range(trainer)), _on(r % cards for r in range(rollout)))
    if trainer + rollout > cards:
        raise UserError(
            f"cluster.placement=split needs {trainer + rollout} cards (trainer.world_size={trainer} + "
            f"rollout.replicas x rollout.tp={rollout}) and this machine has {cards}: lower them, or set "
            f"cluster.placement=colocated"
        )
    return Placement(_on(range(trainer)), _on(range(trainer, trainer + rollout)))


def _on(cards: Iterable[int]) -> tuple[Place, ...]:
    return tuple(Place(HOST, card) for card in cards)
