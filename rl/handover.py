"""Who has the memory of the cards, where rollout and trainer share them."""

from rl.cluster import RolloutFleet, TrainerFleet


class Handover:
    """Hands the cards to and fro: the trainer has the cards while it steps, publishes or is saved; the engines have them
    while they sample.

    Colocated: the engines sleep meanwhile, their pages freed and, unless they are still to serve them, their weights; the
    trainer's masters and moments wait on the host. Split: there is nothing to hand over. No bit depends on it.
    """

    def __init__(self, rollout: RolloutFleet, trainer: TrainerFleet, colocated: bool) -> None:
        self.rollout, self.trainer, self.colocated = rollout, trainer, colocated
        self._trains = False  # of processes that are used again nothing is known
        self.to_trainer(weights_stay=False)

    def to_trainer(self, weights_stay: bool) -> None:
        """Gives the cards to the trainer. `weights_stay`: the engines will sample again before the next publication."""
        if self.colocated and not self._trains:
            self.rollout.sleep(1 if weights_stay else 2)
            self.trainer.onload()
            self._trains = True

    def to_rollout(self) -> None:
        """Gives the cards to the engines, if they are shared and the trainer has them."""
        if self.colocated and self._trains:
            self.trainer.offload()
            self.rollout.wake()
            self._trains = False
