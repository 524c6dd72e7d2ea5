"""The Ray actor of one trainer rank: a process, its rendezvous, and a trainer."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from kernels.collectives.heartbeat import Heartbeat
from kernels.collectives.rendezvous import join
from kernels.host.failures import with_typed_failures
from kernels.host.place import Place
from kernels.model import ConfigError, ModelConfig, Parameter
from kernels.tree import WHOLE
from kernels.weights.adapters import write as write_adapter
from kernels.weights.beside import Beside
from kernels.weights.bucket import Ticket, remove_leftovers
from kernels.weights.cargo import Kind, cargo
from kernels.weights.digest import Leaves, digest, slice_digests
from kernels.weights.files import save
from kernels.weights.initial import initial
from kernels.weights.routes import Recipient
from kernels.weights.tensor_file import WrittenFile
from trainer.batch import Batch, Rows, StepReport
from trainer.checkpoint import Checkpoint, shard_name
from trainer.folder import whole as whole_folder
from trainer.loss import Loss
from trainer.publisher import Publisher, PublishingRank
from trainer.rows import Weights
from trainer.trainer import Trainer, TrainerConfig
from trainer.writer import ShardWriter, check_finite


@with_typed_failures
class TrainerRank(PublishingRank):
    """Runs rank `rank` of the FSDP2 trainer. The driver calls every rank with the same arguments."""

    def __init__(
        self,
        rank: int,
        places: Sequence[Place],
        store: str,
        threads: int,
        model: ModelConfig,
        config: TrainerConfig,
        source: str | int | Checkpoint,
        device: str,
        name: str,
        interface: str | None = None,
        base: str | None = None,
        patience: float | None = None,
    ) -> None:
        """Only remembers; `start` does the work. `places` of all ranks. `source`: a Hugging Face model directory, the seed of
        random weights, or a checkpoint. `name`: of this rank, among all. `interface`: of the network to talk over,
        `patience`: seconds in a collective (both as of `join`). `base`: the model directory under a checkpoint's adapters."""
        self.rank, self.places, self.size, self.store, self.threads = rank, places, len(places), store, threads
        self.config, self.training, self.source, self.device = model, config, source, device
        self.name, self.interface, self.base, self.patience = name, interface, base, patience

    def start(self) -> int:
        """Meets the other ranks, and loads or draws the weights; returns the id of this process. A collective."""
        torch.set_num_threads(self.threads)
        self.places[self.rank].enter()
        Heartbeat(self.name, self.store)
        cards = len(set(self.places))
        join(self.store, self.device, self.rank, self.size, cards, self.interface, self.patience)
        model, source = self.config, self.source
        weights = source if isinstance(source, Checkpoint) else self._weights(model, source)
        mesh = init_device_mesh(self.device, (self.size,))
        base = self._weights(model, self.base) if self.base else None
        if self.training.adapter:
            self._there(self.training.adapter)
        self.trainer = Trainer(model, self.training, mesh, weights, base)
        self.critic: Trainer | None = None
        self.writer = ShardWriter()
        self.shard, shards = self.trainer.shards.get_local_rank(), self.trainer.shards.size()
        here = self.places[self.rank]
        self.publisher = Publisher(model, self.shard, shards, self.training.dtype, here, self.store)
        remove_leftovers()  # of a run that was killed, on this host
        return os.getpid()

    def step(self, batch: Batch, loss: Loss, lr: float) -> StepReport:
        """Does one optimizer step on this rank's part of the batch."""
        return self.trainer.step(batch, loss, lr)

    def begin_adapters(self, model: ModelConfig) -> None:
        """Freezes what was trained so far, and trains the adapters of `model` on it from here on. A collective."""
        whole, mesh = self.trainer.model, self.trainer.mesh
        del self.trainer  # its moments go before there are others
        self.trainer = Trainer(model, self.training, mesh, whole)

    def save_adapter(self, directory: str, base: str) -> None:
        """Writes the adapters, on rank 0, as a folder that `peft` loads, whole or not at all. `base`: the model directory under
        them. A collective."""
        held = self.trainer.adapter_tensors()
        if self.rank == 0:
            check_finite({f"weight.{parameter.name}": tensor for parameter, tensor in held})
            with whole_folder(Path(directory)) as folder:
                write_adapter(folder, self.trainer.model.config, {p.name: t for p, t in held}, base)

    def begin_critic(self, model: ModelConfig, training: TrainerConfig, restored: bool) -> None:
        """Makes a second trainer, of the values: with the body of the policy as it is and a head of zeros or, `restored`, with
        what the checkpoint has that this rank began with. A collective."""
        weights: Weights | Checkpoint = self.trainer.model
        if restored:
            assert isinstance(self.source, Checkpoint)
            weights = self.source
        self.critic = Trainer(model, training, self.trainer.mesh, weights)

    def critic_values(self, batch: Batch) -> Rows:
        """Returns what the critic says before each loss row of this rank's part of the batch."""
        assert self.critic is not None
        return self.critic.forward(batch)

    def step_critic(self, batch: Batch, loss: Loss, lr: float) -> StepReport:
        """Does one optimizer step of the critic."""
        assert self.critic is not None
        return self.critic.step(batch, loss, lr)

    def _trainers(self) -> list[Trainer]:
        return [self.trainer, *([self.critic] if self.critic else [])]

    def freeze(self, model: ModelConfig, source: str | int) -> str:
        """Takes in a model that is never trained, beside the other; `source`: a Hugging Face model directory, or the seed of
        random weights. Returns the digest of its weights as they are used, on rank 0 (others: ""). A collective."""
        self.trainer.freeze(model, self._weights(model, source))
        assert self.trainer.frozen is not None
        return self._digest(model, self.trainer.frozen.weights())

    def thaw(self) -> None:
        """Lets the frozen model go."""
        self.trainer.frozen = None

    def frozen_logprobs(self, batch: Batch) -> Rows:
        """Returns the frozen model's log-probs of this rank's part of the batch."""
        return self.trainer.frozen_logprobs(batch)

    def logprobs(self, batch: Batch) -> Rows:
        """Returns the policy's log-probs of this rank's part of the batch, by the weights as they are."""
        return self.trainer.forward(batch)

    def remember(self) -> None:
        """Keeps the policy's weights as they are, until the next call."""
        self.trainer.remember()

    def past_logprobs(self, batch: Batch) -> Rows:
        """Returns the log-probs of this rank's part of the batch by the weights that were remembered."""
        return self.trainer.past_logprobs(batch)

    def reset_optimizer(self) -> None:
        """Sets the moments and the count of steps to zero."""
        self.trainer.optimizer.reset()

    def offload(self) -> None:
        """Moves this rank's tensors to the host, so that the card is free."""
        for trainer in self._trainers():
            trainer.offload()

    def onload(self) -> None:
        """Moves them back."""
        for trainer in self._trainers():
            trainer.onload()

    def begin_publication(
        self, name: str, recipients: Sequence[Recipient], shards: int, half: int, kind: Kind = "weights"
    ) -> tuple[Ticket, int]:
        """Begins a publication of this rank's rows; returns the ticket of its bucket, and how many buckets follow."""
        to = (recipients, shards, half)
        if kind != "factors":
            return self.publisher.begin(name, self.trainer.rows(kind), *to)
        factors = cargo(kind, self.trainer.model.config, self.training.dtype)
        return self.publisher.begin(name, self.trainer.rows() | self.trainer.rows(kind), *to, factors)

    def digest(self) -> str:
        """Returns `kernels.weights.digest` of the weights as they are served, on rank 0 (others: ""). A collective."""
        return self._digest(self.config, self.trainer.weights())

    def _digest(self, model: ModelConfig, weights: Iterator[tuple[Parameter, torch.Tensor]]) -> str:
        digests: Leaves = {}
        for parameter, whole in weights:
            if self.rank == 0:
                digests |= slice_digests(model, parameter, whole.to(self.trainer.config.dtype), WHOLE)
        return "" if self.rank else digest(digests)

    def snapshot(self, folder: str) -> int:
        """Copies this rank's shard to host memory, and lets a thread write it into `folder`. Waits for the one before.
        Returns the optimizer's step count."""
        self.writer.result(wait=True)  # before the copy: two would be in memory at once
        shards = {name: rows for trainer in self._trainers() for name, rows in trainer.shard().items()}
        copies = {name: rows.to("cpu", torch.float32, copy=True) for name, rows in shards.items()}
        self.writer.start(Path(folder) / shard_name(self.shard, self.trainer.shards.size()), copies)
        return self.trainer.optimizer.steps

    def written(self, wait: bool) -> WrittenFile | None:
        """Returns the file of the last snapshot, None while it is being written. Raises CheckpointError where that failed."""
        return self.writer.result(wait)

    def save(self, directory: str, beside: Beside) -> str:
        """Writes, on rank 0, the master weights as a Hugging Face model directory, with what stands `beside` them, one tensor
        in memory at a time, whole or not at all (no `directory`: they are read alone), and returns their digest (others: "").
        A collective."""
        if self.rank:
            for _ in self.trainer.weights():
                pass
            return ""
        digests: Leaves = {}

        def observed() -> Iterator[tuple[Parameter, torch.Tensor]]:
            for parameter, whole in self.trainer.weights():
                check_finite({f"weight.{parameter.name}": whole})
                digests.update(slice_digests(self.config, parameter, whole, WHOLE))
                yield parameter, whole

        if directory:
            with whole_folder(Path(directory)) as folder:
                save(self.config, observed(), folder, beside=beside)
        else:
            for _ in observed():
                pass
        return digest(digests)

    def _weights(self, model: ModelConfig, source: str | int) -> Weights:
        if isinstance(source, int):
            return initial(model, source, soonest=True)
        return self._there(source)

    def _there(self, folder: str) -> Path:
        if not Path(folder).is_dir():
            where = self.places[self.rank].host
            raise ConfigError(f"{folder} is no folder on {where}: copy it there, or name one that all nodes share")
        return Path(folder)
