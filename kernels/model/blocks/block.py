"""What a block of a layer is, and what the blocks of one layer share in a forward pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kernels.collectives import TreeGroup
from kernels.model.adapter import A, B
from kernels.model.config import ModelConfig
from kernels.model.layout import Layout, PagedCache
from kernels.model.parameter import Parameter
from kernels.ops import Mixture, Quantized, add_rms_norm, combine_add_norm, rms_norm, with_low_rank_gradient

Delta = torch.Tensor | Mixture | None
"""What the next norm adds to the residual stream: [T, H]; one that is summed only then; or nothing, before the first block."""

Weight = torch.Tensor | Quantized
"""A tensor of a layer; of a projection an engine may hold it quantized."""

Weights = Mapping[str, Any]
"""A layer's weights on one shard, each a `Weight`, by the names that its blocks declare; one that the family lacks is not
there."""

Recompute = Callable[..., None]
"""recompute(outputs, function, *inputs): `outputs` are function(*inputs), which is cheap: a trainer that is short of memory may
forget them, and compute them again, to the same bits, when it needs them."""


Routed = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""routed(layer, ids [T, k], logits [T, E], share [T, k]): is told what a router chose, and returns `share`, to which a
trainer may attach a loss."""


def not_told(layer: int, ids: torch.Tensor, logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Does nothing: the hook where nobody wants to know what a router chose."""
    return share


def no_recompute(*_: object) -> None:
    """Recomputes nothing: the no-op hook of whoever keeps everything, or needs nothing."""


@dataclass(frozen=True)
class Costs:
    """Counts what one block of one layer takes. Elements are numbers of the model's dtype, of each token, on one rank
    of one."""

    active: int  # parameters that multiply each token
    pairs: int = 0  # multiply-adds for each pair of a query and a key that it sees
    cached: int = 0  # elements that stay between the steps of an engine
    kept: int = 0  # elements that the backward pass reads
    cheap: int = 0  # elements that it reads too, and that `Recompute` may forget
    working: int = 0  # elements that are alive at once inside, beside the residual stream
    cut: bool = True  # ranks divide `working` among them; else one rank may get all of it
    spare: int = 0  # for so many tokens more at most (rows that fill up the tiles of experts)
    experts: tuple[int, int, int] = (0, 0, 0)  # how many there are, how many a token passes, parameters of each


@dataclass(slots=True)
class Pass:
    """Holds what the blocks of one layer share in one forward pass."""

    config: ModelConfig
    group: TreeGroup
    layer: int
    layout: Layout
    cache: PagedCache | None  # of keys and values; None in training, where they are those of the same tokens
    table: tuple[torch.Tensor, torch.Tensor]
    recompute: Recompute
    routed: Routed

    def seen(self, op: str, *outputs: torch.Tensor) -> None:
        """Shows what an op of this layer returned to who looks (`kernels.model.operations`)."""
        self.config.ops.seen(self.layer, op, *outputs)

    def row_parallel(self, y: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Multiplies y [T, K / S] by this rank's columns of a weight [H, K / S] and sums over all ranks: [T, H],
        rounded once."""
        project, leaves = self.config.ops.project, self.config.leaves // self.group.shard.size
        partial = project(y, weight, leaves, groups=self.layout.groups, out_dtype=self.partial_dtype(y.dtype))
        return self.group.all_reduce(partial, y.dtype)

    def adapted(
        self,
        declared: Callable[[ModelConfig], list[Parameter]],
        weights: Weights,
        name: str,
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> torch.Tensor:
        """Returns y, which is x times the weight `name` with its adapter merged, as it is; `declared`: the block's parameters.
        In training its backward pass gives the adapter, if there is one, its gradient
        (`kernels.ops.with_low_rank_gradient`)."""
        adapter = self.config.adapter
        if adapter is None or name + A not in weights or not torch.is_grad_enabled():
            return y
        of = next(p for p in declared(self.config) if p.name == name)
        given = (weights[name + A], weights[name + B], adapter.scale(of), of.sections, self.config.leaves)
        return with_low_rank_gradient(y, x, *given, self.layout.groups)

    def partial_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns what a rank computes its part of a sum in whose root is rounded to `dtype`: on one rank the kernel rounds."""
        return torch.float32 if self.group.shard.size > 1 else dtype

    def add_and_norm(self, x: torch.Tensor, delta: Delta, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `delta` to the residual stream and returns (its norm, the stream)."""
        eps = self.config.rms_eps
        h, x = add_and_norm(x, delta, weight, eps, self.layout)
        self.recompute((h,), _norm, x, weight, eps)
        return h, x


class Block(Protocol):
    """Describes one residual branch of a layer, a module of `kernels.model.blocks`: a norm, what mixes, and a sum over
    ranks."""

    def parameters(self, config: ModelConfig) -> list[Parameter]:
        """Lists its tensors, named as inside a layer, in the order of files and digests."""

    def costs(self, config: ModelConfig) -> Costs:
        """Counts what it takes in one layer."""

    def forward(
        self, run: Pass, weights: Weights, x: torch.Tensor, delta: Delta
    ) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
        """Takes the residual stream as x [T, H] and a delta that its norm adds, and returns the stream and the block's own
        delta."""


def add_and_norm(
    x: torch.Tensor, delta: Delta, weight: torch.Tensor, eps: float, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (norm, residual stream) after `delta` is added to the stream."""
    if delta is None:
        return rms_norm(x, weight, eps, groups=layout.groups), x
    if isinstance(delta, Mixture):
        return combine_add_norm(x, delta, weight, eps)
    return add_rms_norm(x, delta, weight, eps, groups=layout.groups)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor]:
    return (rms_norm(x, weight, eps),)
