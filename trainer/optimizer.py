"""AdamW over sharded parameters, fed by micro-batches in tree order, clipped by a norm that no sharding changes."""

import math
import operator

import torch
from torch.distributed.tensor import DTensor

from kernels.collectives import TreeGroup
from kernels.host.pinned import host_tensor
from kernels.ops import adamw, fold_rows, square_rows
from kernels.scalars import sqrt_f32
from kernels.tree import Counter, fold
from trainer.config import AdamWConfig, Offload
from trainer.host import Passage, clear
from trainer.model import TrainerModel
from trainer.rows import tie

Node = dict[str, torch.Tensor]
"""A set of gradients, by name: this rank's rows of each."""


class TrainerError(RuntimeError):
    """Says that a step must not touch the weights; one line that says what was not finite."""


class Optimizer:
    """Updates the parameters: `accumulate` after every backward pass, then `step`. Moments are sharded as the parameters are,
    and on the host if `offload` says so."""

    def __init__(self, model: TrainerModel, config: AdamWConfig, device: str, offload: Offload = "none") -> None:
        self.config, self.device, self.offload = config, device, offload
        self.model, self.tied = model, model.config.tied and model.config.adapter is None
        self._passage = Passage(device)
        self._parameters: dict[str, DTensor] = {
            name: parameter  # type: ignore[misc]
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets moments, step count and whatever was accumulated."""
        self.steps = 0
        if not self._moments:
            names = [n for n in self._parameters if not (self.tied and n == "head")]
            self._moments = {n: (self._moment(n), self._moment(n)) for n in names}
        else:
            clear(self.all_moments(), self.device)
        self.discard()

    def _moment(self, name: str) -> torch.Tensor:
        shape, dtype = self._parameters[name].to_local().shape, self.config.moments
        if self.offload == "none":
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return host_tensor(shape, dtype, self.device)

    def moments(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns this rank's rows of both moments of a parameter, to read or to restore in place."""
        return self._moments[name]

    def all_moments(self) -> list[torch.Tensor]:
        """Returns the first and second moments of all parameters, this rank's rows."""
        return [moment for pair in self._moments.values() for moment in pair]

    def accumulate(self, level: int) -> None:
        """Takes the reduced gradient of one micro-batch: the next node, in leaf order, of the tree over micro-batches, and
        the root of 2^level leaves."""
        node = {}
        for name, parameter in self._parameters.items():
            assert isinstance(parameter.grad, DTensor), f"{name} has no gradient"
            node[name] = parameter.grad.to_local()
            parameter.grad = None
        self._gradients.push(node, level)

    def discard(self) -> None:
        """Forgets what was accumulated since the last step."""
        self._gradients = Counter(self._add)

    def _add(self, left: Node, right: Node) -> Node:
        """In the place of `left`: whole sets of gradients are the largest tensors there are."""
        for name, gradient in left.items():
            if gradient.device.type == self.device:
                gradient += right[name]
            elif gradient.numel():
                self._passage.update([right[name]], [gradient], lambda b, a: a.add_(b))
        self._passage.finish()
        return left

    def spoiled(self) -> str:
        """Names the first tensor that is not finite on any rank: a weight, in the order of the forward pass, or else an
        accumulated gradient, in that of the backward pass. A collective, after which nothing is accumulated."""
        gradients: dict[str, torch.Tensor] = self._gradients.root()
        names = list(self._parameters)
        finite = torch.tensor(
            [[self._parameters[name].to_local().isfinite().all(), gradients[name].isfinite().all()] for name in names],
            device=self.device,
        )
        group = TreeGroup(self._parameters[names[0]].device_mesh.get_group())
        everywhere = group.all_gather(finite.to(torch.int32)).amin(0).tolist()
        for name, (weight, _) in zip(names, everywhere, strict=True):
            if not weight:
                return f"the weight {name} is not finite"
        order = ["head", "norm", *reversed([n for n in names if n.startswith("layers.")]), "embed"]
        of = {name: gradient for name, (_, gradient) in zip(names, everywhere, strict=True)}
        bad = next((name for name in order if not of.get(name, True)), None)
        return f"its gradient is not finite from {bad} down" if bad else "every weight and gradient is finite"

    def step(self, lr: float) -> float:
        """Does one update and returns the gradient's norm before clipping. Raises TrainerError, on every rank alike and with
        weights and moments untouched, where that norm is not finite. Forgets what was accumulated either way."""
        gradients: dict[str, torch.Tensor] = self._gradients.root()
        if self.tied:
            gradients = self._add({"embed": gradients["embed"]}, {"embed": gradients.pop("head")}) | gradients
        squares = self._squares(gradients)
        norm = sqrt_f32(fold(list(squares.values()), operator.add).item())
        if not math.isfinite(norm):
            bad = next((name for name, s in squares.items() if not s.isfinite().all()), "all tensors together")
            raise TrainerError(
                f"step {self.steps + 1}: the norm of the gradient of {bad} is not finite in float32; "
                f"the weights were not touched"
            )
        scale = min(1.0, self.config.grad_clip / norm) if norm > 0 else 1.0
        self.steps += 1
        for name, gradient in gradients.items():
            self._update(name, gradient, lr, scale)
        self._passage.finish()
        if self.tied:
            tie(self.model)
        return norm

    def _update(self, name: str, gradient: torch.Tensor, lr: float, scale: float) -> None:
        weight, (first, second) = self._parameters[name].to_local(), self._moments[name]
        decay = self.config.weight_decay if self._parameters[name].dim() > 1 else 0.0

        def work(g: torch.Tensor, w: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> None:
            wide = m.float(), v.float()  # the moments themselves where they are float32
            adamw(
                w,
                g,
                *wide,
                step=self.steps,
                lr=lr,
                betas=self.config.betas,
                eps=self.config.eps,
                weight_decay=decay,
                grad_scale=scale,
            )
            if m.dtype != torch.float32:
                m.copy_(wide[0])
                v.copy_(wide[1])

        if self.offload == "none" and first.dtype == torch.float32:
            work(gradient, weight, first, second)
        elif gradient.numel():
            self._passage.update([gradient], [weight, first, second], work)

    def _squares(self, gradients: Node) -> dict[str, torch.Tensor]:
        """Sum of squares of each tensor, float32 [1]: of each row, then the tree over rows, wherever the rows live."""
        group = TreeGroup(next(iter(self._parameters.values())).device_mesh.get_group())
        rows = {name: self._parameters[name].shape[0] for name in gradients}
        parts = [-(-n // group.shard.size) for n in rows.values()]  # FSDP2 gives the first ranks ceil(rows / size) each
        squares = torch.zeros(sum(parts), device=self.device)
        for gradient, part in zip(gradients.values(), squares.split(parts), strict=True):
            if gradient.numel():
                own = square_rows(gradient.to(self.device).reshape(gradient.shape[0], -1))
                part[: len(own)] = own
        gathered = group.all_gather(squares).split(parts, 1)
        return {
            name: fold_rows(whole.reshape(-1)[:n, None])
            for (name, n), whole in zip(rows.items(), gathered, strict=True)
        }
