"""Watches the routers of a mixture of experts in a step: what they choose, and the loss that asks them to choose evenly.

The load-balancing loss is that of the Switch Transformer (Fedus et al. 2022, equations 4 to 6), of each leaf of the gradient's
tree: with T tokens in a leaf, c_e choices of expert e among them, and P_e the mean share that the router gives e of all,

    loss = coefficient E sum_e c_e / T P_e, in the mean over layers and leaves.

Its gradient for a token's share of e is a product of whole numbers and of the coefficient, so that the cut into micro-batches
changes no bit of it.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.model import ModelConfig
from kernels.model.experts import Experts
from kernels.ops import route


@dataclass
class RoutingReport:
    """Counts what the routers of one step chose, as one rank saw it or as all did."""

    choices: np.ndarray  # int64 [layers, E]: by layer and expert, zeros for a layer that is dense
    chosen: int  # experts of each token
    tokens: int
    entropy: float  # of the routers' distributions, in nats: the sum over tokens and sparse layers

    def __add__(self, other: "RoutingReport") -> "RoutingReport":
        both = self.choices + other.choices, self.chosen, self.tokens + other.tokens, self.entropy + other.entropy
        return RoutingReport(*both)

    @staticmethod
    def merge(parts: Sequence["RoutingReport | None"]) -> "RoutingReport | None":
        """Joins all ranks' reports; None where there are no experts."""
        there = [part for part in parts if part]
        return functools.reduce(operator.add, there) if there else None

    def metrics(self) -> dict[str, float]:
        """Returns `moe/*`: tokens an expert of a layer (least, most, standard deviation over mean), the routers' entropy, and
        the choices that no expert computed: none."""
        sparse = self.choices[self.choices.any(1)]
        deviation = sparse.std(1) / sparse.mean(1)
        return {
            "moe/tokens_per_expert_min": float(sparse.min()),
            "moe/tokens_per_expert_max": float(sparse.max()),
            "moe/tokens_per_expert_cv": float(deviation.mean()),
            "moe/router_entropy": self.entropy / (self.tokens * len(sparse)),
            "moe/dropped_tokens": float(len(sparse) * self.tokens * self.chosen - sparse.sum()),
        }


class Routing:
    """Watches the micro-batches of a step on one rank. A layer that is computed again for the backward pass is not counted
    again."""

    def __init__(self, config: ModelConfig, experts: Experts, coefficient: float, leaves: int, device: str) -> None:
        """`leaves`: of the gradient's tree of the whole batch."""
        self._experts = experts
        sparse = sum(map(experts.sparse, range(config.layers)))
        self._scale = coefficient * experts.count / (sparse * leaves)
        self._groups = torch.zeros(0)
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._choices = torch.zeros(config.layers, experts.count, dtype=torch.int64, device=device)
        self._entropy = torch.zeros((), dtype=torch.float64, device=device)
        self._tokens = 0

    def begin(self, groups: torch.Tensor) -> None:
        """Begins a micro-batch. `groups`: int64 token offsets [G + 1] of its leaves."""
        self._groups, self._held = groups, {}

    def end(self, tokens: int) -> None:
        """Adds up a micro-batch of `tokens` tokens whose forward pass is done."""
        self._tokens += tokens
        for layer, (choices, entropy) in self._held.items():
            self._choices[layer] += choices
            self._entropy += entropy
        self._held = {}

    def told(self, layer: int, ids: torch.Tensor, logits: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Notes what a router chose; returns `share`, through which the loss reaches the router's logits, if there is one."""
        tokens, count = len(ids), self._experts.count
        leaf = torch.searchsorted(self._groups, torch.arange(tokens, device=ids.device), right=True) - 1
        cells = (leaf[:, None] * count + ids).flatten()
        by_leaf = torch.zeros((len(self._groups) - 1) * count, dtype=torch.int64, device=ids.device)
        by_leaf = by_leaf.scatter_add_(0, cells, torch.ones_like(cells)).view(-1, count)
        with torch.no_grad():
            spread = torch.log_softmax(logits.double(), 1)
            self._held[layer] = by_leaf.sum(0), -(spread.exp() * spread).sum()  # again, if it is computed again
        if not self._scale:
            return share
        _, every = route(logits, count, False)
        size = (self._groups[1:] - self._groups[:-1]).double()
        gradient = (by_leaf.double() * (self._scale / (size * size))[:, None]).float()[leaf]
        return _Attached.apply(share, every, gradient)

    def report(self) -> RoutingReport:
        """Returns what this rank saw."""
        choices = self._choices.cpu().numpy()
        return RoutingReport(choices, self._experts.chosen, self._tokens, float(self._entropy))


class _Attached(torch.autograd.Function):
    """Hands `x` on, and gives `y` a gradient."""

    @staticmethod
    def forward(ctx, x, y, gradient):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return dx, gradient, None
