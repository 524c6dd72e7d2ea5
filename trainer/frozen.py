"""A model that is never trained and says how likely it finds what was sampled: a reference, a teacher, the policy as it was.

Its log-probs are those of the trainer's forward pass, of `kernels.model` over FSDP2, and so what a sampler with these weights
would have recorded. Its weights are sharded as the trainer's are, and held rounded, as every op would round them: no masters,
no moments, no gradients. A checkpoint does not have them; whoever goes on brings them again, and compares the digest.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.model import ModelConfig, Parameter, saved
from trainer.batch import Batch, Rows
from trainer.model import TrainerModel, batch_logprobs
from trainer.parallelize import gather, parallelize
from trainer.rows import Weights, load, tie


class Frozen:
    """Holds one rank's rows of a frozen model; every method is called on all ranks of `mesh`."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, mesh: DeviceMesh, weights: Weights) -> None:
        """`dtype` of activations and of the weights that are held."""
        self.device = mesh.device_type
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

    @torch.no_grad()
    def logprobs(self, batch: Batch, start: int, stop: int, leaf_sequences: int) -> Rows:
        """Computes the log-probs of the loss rows of sequences start .. stop of `batch`, float32, under each row's own
        temperature and filters."""
        part = batch.take(start, stop)
        values = batch_logprobs(self.model, part, leaf_sequences, self.device).cpu().numpy()
        return Rows(values, np.arange(start, stop), part.counts)

    def weights(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """Yields every parameter, whole, one at a time, on every rank."""
        named = dict(self.model.named_parameters())
        for parameter in saved(self.model.config):
            yield parameter, gather(named[parameter.name].detach())
