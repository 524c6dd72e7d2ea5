"""The processes of a run: Ray actors of the rollout engines and of the trainer, as two fleets."""

from rl.cluster.fleets import RolloutFleet, TrainerFleet
from rl.cluster.ray_processes import left_at_once, session
from rl.cluster.start import cluster, rendezvous, training_of
