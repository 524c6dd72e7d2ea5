"""The Ray actor of one trainer rank: a process, its rendezvous, and a trainer."""

from datetime import timedelta

import ray
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kernels.model import ModelConfig
from kernels.model.weights import Leaves, Parameter, initial, load, save, slice_digests
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
    ) -> None:
        """`source`: a Hugging Face model directory, or the seed of random weights."""
        torch.set_num_threads(threads)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
        self.rank, self.config = rank, model
        weights = initial(model, source) if isinstance(source, int) else load(model, source)
        self.trainer = Trainer(model, config, init_device_mesh("cpu", (size,)), weights)

    def step(self, batch: Batch, objective: Objective, lr: float) -> StepReport:
        return self.trainer.step(batch, objective, lr)

    def reset_optimizer(self) -> None:
        self.trainer.optimizer.reset()

    def publish(self) -> tuple[dict[str, "ray.ObjectRef"], Leaves]:
        """Rank 0: a reference to every whole parameter in the object store, and the digest of every slice. Other ranks take
        part in the gathers and return empty ones."""
        references: dict[str, ray.ObjectRef] = {}
        digests: Leaves = {}

        def put(parameter: Parameter, whole: torch.Tensor) -> None:
            nonlocal digests
            references[parameter.name] = ray.put(whole.cpu().numpy())
            digests |= slice_digests(self.config, parameter, whole, WHOLE)

        self.trainer.publish(put)
        return references, digests

    def save(self, directory: str) -> None:
        """Rank 0 writes a Hugging Face model directory. A collective."""
        whole = list(self.trainer.weights())
        if self.rank == 0:
            save(self.config, whole, directory)
