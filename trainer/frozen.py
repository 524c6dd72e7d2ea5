"""A model that is never trained and says how likely it finds what was sampled: a reference, a teacher, the policy as it was.

Its log-probs are those of the trainer's forward pass, of `kernels.model`, and so what a sampler with these weights
would have recorded. Its weights are sharded as the trainer's are, and held rounded, as every op would round them: no masters,
no moments, no gradients. A checkpoint does not have them; whoever goes on brings them again, and compares the digest.
"""

from collections.abc import Iterator

import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.model import ModelConfig, Parameter, saved
from trainer.model import TrainerModel
from trainer.parallelize import gather, parallelize
from trainer.rows import Weights, load, tie


class Frozen:
    """Holds one rank's rows of a frozen model; every method is called on all ranks of `mesh`."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, mesh: DeviceMesh, weights: Weights) -> None:
        """`dtype` of activations and of the weights that are held."""
        with torch.device("meta"):
            self.model = TrainerModel(model, dtype).to(dtype).requires_grad_(False)
        self.mesh = mesh
        parallelize(self.model, mesh, forward_only=True)
        self.load(weights)

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Takes other weights in the place of those that are held."""
        load(self.model, self.mesh, weights)
        if self.model.config.tied:
            tie(self.model)

    def weights(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """Yields every parameter, whole, one at a time, on every rank."""
        named = dict(self.model.named_parameters())
        for parameter in saved(self.model.config):
            yield parameter, gather(named[parameter.name].detach())
