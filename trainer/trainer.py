"""From a batch to new weights."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.collectives import TreeGroup
from kernels.model import Layout, ModelConfig, Parameter, saved, served, trained
from kernels.weights.files import find, read_rows
from kernels.weights.reshard import fsdp_rows
from trainer.batch import Batch, MicroBatch, StepReport, cut, cut_by_tokens
from trainer.checkpoint import PARTS, Checkpoint
from trainer.checkpoint import read_rows as checkpoint_rows
from trainer.host import Waiting, process_peak
from trainer.loss import Clip, Objective, likelihood_loss, policy_loss
from trainer.model import TrainerModel
from trainer.optimizer import AdamWConfig, Offload, Optimizer, TrainerError
from trainer.parallelize import fill, gather, parallelize
from trainer.recompute import Checkpointing


@dataclass(frozen=True)
class TrainerConfig:
    leaf_sequences: int  # sequences of one leaf of the gradient's tree: part of the run's identity, like its seed
    micro_leaves: int  # leaves of one micro-batch: changes memory and speed, and no bit
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    clip: Clip = field(default_factory=Clip)
    dtype: torch.dtype = torch.float32  # of activations
    micro_tokens: int | None = None  # most tokens of a micro-batch, in the place of micro_leaves; likewise
    offload: Offload = "none"  # what lives in host memory; likewise
    checkpointing: Checkpointing = "none"  # what a layer computes again in the backward pass; likewise


class Trainer:
    """One FSDP2 rank; every method is called on all ranks of `mesh`, with the same arguments.

    The sum over sequences is one tree: leaves of `leaf_sequences` consecutive sequences; a micro-batch is an aligned subtree
    summed inside the kernels; ranks hold neighbouring subtrees, joined by the reduce-scatter; micro-batches are joined by a
    counter. The weights therefore depend on neither the cut into micro-batches nor the size of the mesh.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TrainerConfig,
        mesh: DeviceMesh,
        weights: Iterable[tuple[Parameter, torch.Tensor]] | Checkpoint | Path,
    ) -> None:
        """`weights`: whole parameters, one at a time; a Hugging Face model directory, of which each rank reads its rows alone;
        or a checkpoint of any number of ranks, whose moments and step count come with it."""
        self.config, self.mesh = config, mesh
        self.device = mesh.device_type
        with torch.device("meta"):
            self.model = TrainerModel(model, config.dtype, config.checkpointing)
        parallelize(self.model, mesh, on_host=config.offload == "all")
        self.optimizer = Optimizer(self.model, config.optimizer, self.device, config.offload)
        self._waiting = Waiting(self.device)
        with torch.no_grad():
            if isinstance(weights, Checkpoint):
                self._restore(weights)
            elif isinstance(weights, Path):
                where = find(model, weights)
                for parameter, start, stop, held in self._rows():
                    held.copy_(read_rows(where, parameter, start, stop))
            else:
                named = dict(self.model.named_parameters())
                for parameter, whole in weights:
                    fill(named[parameter.name], whole)
            if model.tied:
                self.optimizer.tie()

    def step(self, batch: Batch, objective: Objective, lr: float) -> StepReport:
        """One optimizer step on `batch`. Raises TrainerError on all ranks, with weights and moments untouched, where a
        log-prob, the loss or the gradient of any of them is not finite."""
        self._check_onloaded()
        world, rank = self.mesh.size(), self.mesh.get_local_rank()
        self.optimizer.discard()  # of a step that failed
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        logprobs, sequences, responses = [], [], []
        loss = clipped = 0.0
        for micro_batch in self.cut(batch):
            start, stop = micro_batch.sequences(rank, self.config.leaf_sequences)
            part = batch.take(start, stop)
            values, part_loss, part_clipped = self._backward(part, objective)
            self.optimizer.accumulate(micro_batch.level(world))
            logprobs.append(values)
            sequences.append(np.arange(start, stop))
            responses.append(part.responses)
            loss, clipped = loss + part_loss, clipped + part_clipped
        all_logprobs = np.concatenate(logprobs)
        self._check_finite(all_logprobs, loss)
        grad_norm = self.optimizer.step(lr)
        return StepReport(
            logprobs=all_logprobs,
            sequences=np.concatenate(sequences),
            responses=np.concatenate(responses),
            loss=loss,
            clip_fraction=clipped / len(all_logprobs),
            grad_norm=grad_norm,
            step=self.optimizer.steps,
            peak_bytes=torch.cuda.max_memory_allocated() if self.device == "cuda" else process_peak(),
            host_peak_bytes=process_peak(),
        )

    def cut(self, batch: Batch) -> list[MicroBatch]:
        """The micro-batches of a step on `batch`, the same on every rank. BatchError where the numbers do not fit."""
        config, world = self.config, self.mesh.size()
        if config.micro_tokens is None:
            return cut(batch.lengths, config.leaf_sequences, world, config.micro_leaves)
        return cut_by_tokens(batch.lengths, config.leaf_sequences, world, config.micro_tokens)

    def _backward(self, part: Batch, objective: Objective) -> tuple[np.ndarray, float, int]:
        """(log-probs, weighted loss, clipped tokens) of one micro-batch; its gradients are left in the parameters."""

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(self.device)

        leaf = self.config.leaf_sequences
        groups = [leaf] * (part.sequences // leaf)
        layout = Layout.packed(part.lengths.tolist(), groups, self.device)
        row_groups = np.concatenate([[0], np.cumsum(part.responses)])[::leaf]
        logprobs = self.model(
            tensor(part.token_ids),
            layout,
            tensor(part.response_rows()),
            tensor(row_groups),
            tensor(part.temperatures),
            part.truncation.to(self.device),
        )
        clipped = torch.zeros(1, dtype=torch.bool)
        if objective == "policy":
            losses, clipped = policy_loss(logprobs, tensor(part.logprobs), tensor(part.advantages), self.config.clip)
        else:
            losses = likelihood_loss(logprobs)
        weighted = losses * tensor(part.weights)
        weighted.backward(torch.ones_like(weighted))  # as their sum's would be; what follows waits for the device
        return logprobs.detach().cpu().numpy(), float(weighted.detach().double().sum()), int(clipped.sum())

    def _check_finite(self, logprobs: np.ndarray, loss: float) -> None:
        """A collective: a rank that raised alone would leave the others waiting for its gradient."""
        bad = np.flatnonzero(~np.isfinite(logprobs))[:1]
        mine = torch.tensor([loss, *bad, *logprobs[bad]], dtype=torch.float64, device=self.device)
        mine = torch.nn.functional.pad(mine, (0, 3 - mine.numel()), value=-1.0)
        for rank, (value, token, logprob) in enumerate(TreeGroup(self.mesh.get_group()).all_gather(mine).tolist()):
            what = f"the log-prob of response token {int(token)}" if token >= 0 else "the loss"
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
        if self.config.offload != "all":
            held += [p.detach().to_local() for p in self.model.parameters()]  # type: ignore[operator]
        self.optimizer.discard()
        self._waiting.leave(held)

    def onload(self) -> None:
        """The reverse of `offload`: the same bits."""
        self._waiting.back()

    def _check_onloaded(self) -> None:
        if self._waiting.away:
            raise TrainerError("the trainer's weights wait in host memory: call onload() first")

    def shard(self) -> dict[str, torch.Tensor]:
        """This rank's rows of all that a checkpoint holds, in place: whoever keeps them must copy."""
        self._check_onloaded()
        named = dict(self.model.named_parameters())
        out = {}
        for parameter in trained(self.model.config):
            held = (named[parameter.name].detach().to_local(), *self.optimizer.moments(parameter.name))
            out |= {f"{part}.{parameter.name}": rows for part, rows in zip(PARTS, held, strict=True)}
        return out

    def _rows(self) -> Iterator[tuple[Parameter, int, int, torch.Tensor]]:
        """Every parameter of which this rank holds rows start .. stop, and these, in place."""
        named = dict(self.model.named_parameters())
        for parameter in trained(self.model.config):
            mine = fsdp_rows(parameter.shape[0], self.mesh.get_local_rank(), self.mesh.size())
            if mine:
                yield parameter, mine.start, mine.stop, named[parameter.name].detach().to_local()

    def _restore(self, checkpoint: Checkpoint) -> None:
        for parameter, start, stop, weight in self._rows():
            for part, held in zip(PARTS, (weight, *self.optimizer.moments(parameter.name)), strict=True):
                held.copy_(checkpoint_rows(checkpoint, part, parameter.name, parameter.shape[0], start, stop))
        self.optimizer.steps = checkpoint.optimizer_steps

    def rows(self) -> dict[str, torch.Tensor]:
        """This rank's rows of all that is served, float32, in place."""
        self._check_onloaded()
        named = dict(self.model.named_parameters())
        return {p.name: named[p.name].detach().to_local() for p in served(self.model.config)}  # type: ignore[operator]

    def weights(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """All that is saved, whole, float32, one at a time, on every rank. A collective."""
        self._check_onloaded()
        named = dict(self.model.named_parameters())
        for parameter in saved(self.model.config):
            yield parameter, gather(named[parameter.name].detach())
