"""The Ray actor of one trainer rank: a process, its rendezvous, and a trainer."""

from datetime import timedelta

import ray
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kernels.collectives import backend_of
from kernels.model import ModelConfig
from kernels.model.weights import Leaves, digest, initial, load, save, slice_digests
from kernels.tree import WHOLE
from trainer.batch import Batch, StepReport
from trainer.loss import Objective
from trainer.trainer import Trainer, TrainerConfig


class TrainerRank:
    """Rank `rank` of the FSDP2 trainer. The driver calls every rank with the same arguments."""

    def __init__(
        self,
        rank: int,
        size: int,
        store: str,
        threads: int,
        model: ModelConfig,
        config: TrainerConfig,
        source: str | int,
        device: str,
    ) -> None:
        """`source`: a Hugging Face model directory, or the seed of random weights. Ranks share the devices there are."""
        torch.set_num_threads(threads)
        if device == "cuda":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        backend = backend_of(device, size)
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
        self.rank, self.config = rank, model
        weights = initial(model, source) if isinstance(source, int) else load(model, source)
        self.trainer = Trainer(model, config, init_device_mesh(device, (size,)), weights)

    def step(self, batch: Batch, objective: Objective, lr: float) -> StepReport:
        return self.trainer.step(batch, objective, lr)

    def reset_optimizer(self) -> None:
        self.trainer.optimizer.reset()

    def publish(self) -> tuple[dict[str, "ray.ObjectRef"], Leaves]:
        """Rank 0: a reference to the bits of every whole parameter, rounded to the model's dtype, in the object store, and the
        digest of every slice. Other ranks take part in the gathers and return empty ones."""
        references: dict[str, ray.ObjectRef] = {}
        digests: Leaves = {}
        for parameter, whole in self.trainer.weights():
            if self.rank == 0:
                served = whole.to(self.trainer.config.dtype)
                digests |= slice_digests(self.config, parameter, served, WHOLE)
                bits = served.cpu().view(torch.int32 if served.dtype == torch.float32 else torch.int16)
                references[parameter.name] = ray.put(bits.numpy())
        return references, digests

    def save(self, directory: str) -> str:
        """Rank 0 writes the master weights as a Hugging Face model directory and returns their digest (others: ""). A
        collective."""
        digests: Leaves = {}
        whole = list(self.trainer.weights())
        if self.rank:
            return ""
        for parameter, tensor in whole:
            digests |= slice_digests(self.config, parameter, tensor, WHOLE)
        save(self.config, whole, directory)
        return digest(digests)
