"""Turns a batch into new weights."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.collectives import TreeGroup
from kernels.gpu.card import choose_family
from kernels.model import ModelConfig, Parameter, saved, trained
from kernels.weights.cargo import Kind, cargo
from trainer.adapters import Adapters, adapter_tensors
from trainer.batch import Batch, MicroBatch, Rows, StepReport, cut, cut_by_tokens
from trainer.checkpoint import PARTS, Checkpoint
from trainer.checkpoint import read_rows as checkpoint_rows
from trainer.config import TrainerConfig
from trainer.frozen import Frozen
from trainer.host import Waiting, process_peak
from trainer.loss import Loss, LossRows
from trainer.model import TrainerModel, batch_logprobs
from trainer.optimizer import Optimizer, TrainerError
from trainer.parallelize import divided, drop_gathered, gather, parallelize
from trainer.routing import Routing
from trainer.rows import Weights, held_rows, load, local_rows, tie


class Trainer:
    """Trains on one rank; every method is called on all ranks of `mesh`, with the same arguments.

    The sum over sequences is one tree: leaves of `leaf_sequences` consecutive sequences; a micro-batch is an aligned subtree
    summed inside the kernels; ranks hold neighbouring subtrees, joined by the reduce-scatter; micro-batches are joined by a
    counter. The weights therefore depend on neither the cut into micro-batches, nor the size of the mesh, nor how many times
    its ranks hold the model.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrainerConfig,
        mesh: DeviceMesh,
        weights: Weights | Checkpoint,
        base: Weights | None = None,
    ) -> None:
        """`weights`: as of `trainer.rows`, or a checkpoint of any world size, whose moments and step count come with it. With
        adapters they are frozen; a checkpoint then holds the adapters alone, and `base` are the frozen ones."""
        self.config, self.mesh = config, mesh
        self.shards, replicas = divided(mesh, config.replicas)
        self.device = mesh.device_type
        if self.device == "cuda":
            choose_family(config.family)
        with torch.device("meta"):
            self.model = TrainerModel(model, config.dtype, config.checkpointing)
        parallelize(self.model, self.shards, on_host=config.offload == "all", replicas=replicas)
        self.optimizer = Optimizer(self.model, config.optimizer, self.device, config.offload)
        self.frozen: Frozen | None = None
        self.past: Frozen | None = None  # the policy as it was
        self._waiting = Waiting(self.device)
        self.adapters: Adapters | None = None
        if model.adapter:
            self._begin_adapters(weights, base)
        elif isinstance(weights, Checkpoint):
            self._restore(weights)
        else:
            load(self.model, self.shards, weights)
        if model.tied:
            tie(self.model)

    def _begin_adapters(self, weights: Weights | Checkpoint, base: Weights | None) -> None:
        """Takes in the frozen weights, and adapters of a checkpoint or new ones."""
        frozen = base if isinstance(weights, Checkpoint) else weights
        if frozen is None:
            raise TrainerError("a checkpoint of adapters does not hold the weights under them: say which they are")
        load(self.model, self.shards, frozen)
        self.adapters = Adapters(self.model, self.shards, on_host=self.config.offload != "none")
        if isinstance(weights, Checkpoint):
            self._restore(weights)
        elif self.config.adapter:
            self.adapters.load(self.config.adapter)
        else:
            self.adapters.begin(self.config.seed)
        self.adapters.merge()

    def forward(self, batch: Batch) -> Rows:
        """Returns what the model says of this rank's loss rows of `batch`, float32: no bit depends on the micro-batches or on
        the other ranks. Nothing is kept for a backward pass. A collective."""
        rows = self._rows_of(self.model, batch)
        drop_gathered(self.model)
        return rows

    def freeze(self, model: ModelConfig, weights: Weights) -> None:
        """Takes in a model that is never trained, sharded beside the other, in the dtype of activations: a reference, a
        teacher. A collective."""
        self.frozen = None  # two would be in memory at once
        self.frozen = Frozen(model, self.config.dtype, self.shards, weights)

    def frozen_logprobs(self, batch: Batch) -> Rows:
        """Returns the frozen model's log-probs of this rank's loss rows of `batch`, as the forward pass of a step computes
        them: no bit depends on the micro-batches or on the other ranks. A collective."""
        if self.frozen is None:
            raise TrainerError("there is no frozen model: call freeze() first")
        return self._rows_of(self.frozen.model, batch)

    def remember(self) -> None:
        """Keeps the policy's weights, rounded as its forward pass rounds them, until the next call. A collective."""
        self._check_onloaded()
        if self.past is None:
            plain = replace(self.model.config, adapter=None)  # merged
            self.past = Frozen(plain, self.config.dtype, self.shards, self.model)
        else:
            self.past.load(self.model)

    def past_logprobs(self, batch: Batch) -> Rows:
        """Returns, as `forward` would have when `remember` was called, the log-probs of this rank's loss rows of `batch`. A
        collective."""
        if self.past is None:
            raise TrainerError("no weights were remembered: call remember() first")
        return self._rows_of(self.past.model, batch)

    @torch.no_grad()
    def _rows_of(self, model: TrainerModel, batch: Batch) -> Rows:
        """Returns what `model` says of this rank's loss rows, micro-batch by micro-batch, each under its own temperature and
        filters."""
        self._check_onloaded()
        rank, leaf, parts = self.mesh.get_local_rank(), self.config.leaf_sequences, []
        for micro_batch in self.cut(batch):
            start, stop = micro_batch.sequences(rank, leaf)
            part = batch.take(start, stop)
            values = batch_logprobs(model, part, leaf, self.device).cpu().numpy()
            parts.append(Rows(values, np.arange(start, stop), part.counts))
        return Rows.merge(parts)

    def step(self, batch: Batch, loss: Loss, lr: float) -> StepReport:
        """Takes one optimizer step on `batch`. Raises TrainerError on all ranks, with weights and moments untouched, where a
        log-prob, the loss or the gradient of any of them is not finite."""
        self._check_onloaded()
        world, rank = self.mesh.size(), self.mesh.get_local_rank()
        self.optimizer.discard()  # of a step that failed
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        logprobs, sequences, counts, routing = [], [], [], self._routing(batch)
        total, clipped = 0.0, 0
        for micro_batch in self.cut(batch):
            start, stop = micro_batch.sequences(rank, self.config.leaf_sequences)
            part = batch.take(start, stop)
            values, part_loss, part_clipped = self._backward(part, loss, routing)
            self.optimizer.accumulate(micro_batch.level(world))
            logprobs.append(values)
            sequences.append(np.arange(start, stop))
            counts.append(part.counts)
            total, clipped = total + part_loss, clipped + part_clipped
        all_logprobs = np.concatenate(logprobs)
        self._check_finite(all_logprobs, total)
        grad_norm = self.optimizer.step(lr)
        if self.adapters:
            self.adapters.merge()
        return StepReport(
            logprobs=all_logprobs,
            sequences=np.concatenate(sequences),
            counts=np.concatenate(counts),
            loss=total,
            clipped=clipped,
            grad_norm=grad_norm,
            step=self.optimizer.steps,
            peak_bytes=torch.cuda.max_memory_allocated() if self.device == "cuda" else process_peak(),
            host_peak_bytes=process_peak(),
            routing=routing.report() if routing else None,
        )

    def _routing(self, batch: Batch) -> Routing | None:
        """Returns what watches the routers of a step on `batch`; None where there are none."""
        model, leaves = self.model.config, batch.sequences // self.config.leaf_sequences
        if model.experts is None:
            return None
        return Routing(model, model.experts, self.config.router_aux_loss_coef, leaves, self.device)

    def cut(self, batch: Batch) -> list[MicroBatch]:
        """Returns the micro-batches of a step on `batch`, the same on every rank. BatchError where the numbers do not fit."""
        config, world = self.config, self.mesh.size()
        if config.micro_tokens is None:
            return cut(batch.lengths, config.leaf_sequences, world, config.micro_leaves)
        return cut_by_tokens(batch.lengths, config.leaf_sequences, world, config.micro_tokens)

    def _backward(self, part: Batch, loss: Loss, routing: Routing | None) -> tuple[np.ndarray, float, int]:
        """Returns (log-probs, weighted loss, clipped rows) of one micro-batch; its gradients are left in the parameters."""
        logprobs = batch_logprobs(self.model, part, self.config.leaf_sequences, self.device, routing)
        columns = (
            part.logprobs,
            part.advantages,
            part.versions,
            part.sequence,
            part.reference,
            part.values,
            part.returns,
        )
        seen = (torch.from_numpy(column).to(self.device) for column in columns)
        weights = torch.from_numpy(part.weights).to(self.device)
        losses, clipped = loss(logprobs, LossRows(*seen))
        weighted = losses * weights
        weighted.backward(torch.ones_like(weighted))  # as their sum's would be; what follows waits for the device
        return logprobs.detach().cpu().numpy(), float(weighted.detach().double().sum()), int(clipped.sum())

    def _check_finite(self, logprobs: np.ndarray, loss: float) -> None:
        """A collective: a rank that raised alone would leave the others waiting for its gradient."""
        bad = np.flatnonzero(~np.isfinite(logprobs))[:1]
        mine = torch.tensor([loss, *bad, *logprobs[bad]], dtype=torch.float64, device=self.device)
        mine = torch.nn.functional.pad(mine, (0, 3 - mine.numel()), value=-1.0)
        for rank, (value, token, logprob) in enumerate(TreeGroup(self.mesh.get_group()).all_gather(mine).tolist()):
            what = "the loss"
            if token >= 0:
                critic = self.model.config.head == "value"
                what = (
                    f"the value before token {int(token)}" if critic else f"the log-prob of response token {int(token)}"
                )
            if token >= 0 or not np.isfinite(value):
                raise TrainerError(
                    f"step {self.optimizer.steps + 1}: {what} on rank {rank} is {logprob if token >= 0 else value}; "
                    f"{self.optimizer.spoiled()}; the weights were not touched"
                )

    def offload(self) -> None:
        """Moves what a step leaves behind, the master weights and the moments, to host memory, and hands the card's memory
        back to the driver (colocated mode: the rollout samples meanwhile). Nothing else works until `onload`."""
        if self._waiting.away:
            return
        held: list[torch.Tensor] = []
        if self.config.offload == "none":
            held += self.optimizer.all_moments()
            held += self.adapters.frozen.values() if self.adapters else ()
        if self.config.offload != "all":
            held += local_rows(self.model).values()
        for beside in filter(None, (self.frozen, self.past)):
            held += local_rows(beside.model).values()
        self.optimizer.discard()
        self._waiting.leave(held)

    def onload(self) -> None:
        """Brings back what `offload` moved: the same bits."""
        self._waiting.back()

    def _check_onloaded(self) -> None:
        if self._waiting.away:
            raise TrainerError("the trainer's weights wait in host memory: call onload() first")

    def shard(self) -> dict[str, torch.Tensor]:
        """Returns this rank's rows of all that a checkpoint holds, in place: whoever keeps them must copy."""
        self._check_onloaded()
        local, out = local_rows(self.model), dict[str, torch.Tensor]()
        for parameter in trained(self.model.config):
            held = (local[parameter.name], *self.optimizer.moments(parameter.name))
            out |= {
                f"{self.config.prefix}{part}.{parameter.name}": rows for part, rows in zip(PARTS, held, strict=True)
            }
        return out

    @torch.no_grad()
    def _restore(self, checkpoint: Checkpoint) -> None:
        for parameter, start, stop, weight in held_rows(self.model, self.shards):
            if not parameter.trained:
                continue
            for part, held in zip(PARTS, (weight, *self.optimizer.moments(parameter.name)), strict=True):
                held.copy_(
                    checkpoint_rows(
                        checkpoint, self.config.prefix + part, parameter.name, parameter.shape[0], start, stop
                    )
                )
        self.optimizer.steps = checkpoint.optimizer_steps

    def rows(self, kind: Kind = "weights") -> dict[str, torch.Tensor]:
        """Returns this rank's rows of what a publication carries, in place. All that is served: float32 masters or, merged with
        their adapters, weights in the dtype of activations; with the frozen ones in their place; or A and B, float32."""
        self._check_onloaded()
        local = local_rows(self.model)
        under = self.adapters.frozen if kind == "frozen" and self.adapters else {}
        carried = cargo(kind, self.model.config, self.config.dtype).parameters
        return {p.name: under.get(p.name, local[p.name]) for p in carried}

    def weights(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """Yields all that is saved, whole, one at a time, on every rank: float32 masters or merged weights, as of `rows`. A
        collective."""
        self._check_onloaded()
        named = dict(self.model.named_parameters())
        for parameter in saved(self.model.config):
            yield parameter, gather(named[parameter.name].detach())

    def adapter_tensors(self) -> list[tuple[Parameter, torch.Tensor]]:
        """Returns every A and B, whole, float32, on every rank. A collective."""
        self._check_onloaded()
        return adapter_tensors(self.model)
