"""Which card each process has."""

from dataclasses import dataclass

from rl.config import RunConfig
from rl.errors import UserError

CPU = -1


@dataclass(frozen=True)
class Placement:
    """The card of each rank, or CPU."""

    trainer: tuple[int, ...]
    rollout: tuple[int, ...]  # engine by engine


def place(config: RunConfig, cards: int) -> Placement:
    """On a machine with so many cards. Colocated ranks go round them, both kinds from card 0 on, and hand their memory to each
    other; split ones have a card each, the trainer's first. UserError where there is none, or a split needs more."""
    trainer, rollout = config.trainer.world_size, config.rollout.replicas * config.rollout.tp
    if config.device == "cpu":
        return Placement((CPU,) * trainer, (CPU,) * rollout)
    if not cards:
        raise UserError("device=cuda: this machine has no CUDA device; use device=cpu, or dry_run=true for the plan")
    if config.cluster.placement == "colocated":
        return Placement(tuple(w % cards for w in range(trainer)), tuple(r % cards for r in range(rollout)))
    if trainer + rollout > cards:
        raise UserError(
            f"cluster.placement=split needs {trainer + rollout} cards (trainer.world_size={trainer} + "
            f"rollout.replicas x rollout.tp={rollout}) and this machine has {cards}: lower them, or set "
            f"cluster.placement=colocated"
        )
    return Placement(tuple(range(trainer)), tuple(range(trainer, trainer + rollout)))
