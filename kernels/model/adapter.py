"""Adapters: low-rank additions to frozen weights, W' = W + scale B A (LoRA, Hu et al. 2021), and the tensors that they add.

A matrix that the model holds may be several of a file, one below the other (q, k, v; those of all experts). Each of these has
an A of its own, so that a file of adapters has them apart: A [matrices r, K], B [N, r]; row n of W' is W[n] + scale B[n]
A[matrix of n].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from kernels.model.fields import ConfigError
from kernels.model.parameter import Parameter, Target

A, B = "_A", "_B"
"""What the names of the two end in, after that of the weight."""
_UNIT = 16  # a tensor core's step: ranks are held as multiples, filled up with zeros that stay zeros
_TIED = " (its head is its embedding, which is read by rows and has none)"


@dataclass(frozen=True)
class Adapter:
    """Says which weights have an adapter, of which rank, and how it is scaled."""

    ranks: tuple[tuple[Target, int], ...]
    alpha: float
    rslora: bool = False  # rank-stabilised (Kalajdzievski 2023)

    def rank(self, parameter: Parameter) -> int:
        """Returns the rank of a weight's adapter; 0: it has none."""
        return dict(self.ranks).get(parameter.target, 0) if parameter.target else 0

    def scale(self, parameter: Parameter) -> float:
        """Returns alpha / rank, with rslora alpha / sqrt(rank): the nearest float64."""
        rank = self.rank(parameter)
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def held_rank(self, parameter: Parameter) -> int:
        """Returns the rank that A and B are held with: a multiple of 16; what is more than the rank is zeros, always."""
        return -(-self.rank(parameter) // _UNIT) * _UNIT

    def tensors(self, parameter: Parameter) -> tuple[Parameter, Parameter]:
        """Describes A and B of a weight that has an adapter; B is laid out in rows as the weight is. Shards of the weight need
        its rows of B, or its columns of A; one of whole experts needs their A."""
        rank, axis, matrices = self.held_rank(parameter), parameter.axis, len(parameter.matrices)
        whole = axis == 0 and matrices > len(parameter.sections)  # matrices that no shard cuts
        a_axis, b_axis = axis if axis == 1 or whole else None, 0 if axis == 0 else None
        a = Parameter(parameter.name + A, (matrices * rank,), parameter.columns, (), a_axis)
        b = replace(
            parameter, name=parameter.name + B, columns=rank, hf_names=(), axis=b_axis, to_stream=False, target=None
        )
        return replace(a, served=False, saved=False), replace(b, trained=True, served=False, saved=False)

    def added_to(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """Lists the parameters of a model, which are frozen, and after each that has an adapter its A and B."""
        out = []
        for parameter in parameters:
            out.append(replace(parameter, trained=False))
            if self.rank(parameter):
                out += self.tensors(parameter)
        return out

    def check(self, parameters: Sequence[Parameter]) -> None:
        """Raises ConfigError where a model of these parameters cannot have it."""
        there = [target for target in get_args(Target) if any(p.target == target for p in parameters)]
        for target, rank in self.ranks:
            if target not in there:
                why = _TIED if target == "head" else ""
                raise ConfigError(f"adapter of {target}: this model has {', '.join(there)}{why}; ask for these alone")
            if not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"adapter of {target}: rank {rank} must be a positive integer")
            for p in parameters:
                width = min(p.columns, *p.matrices)
                if p.target == target and rank > width:
                    raise ConfigError(
                        f"adapter of {target}: rank {rank} is above {width}, the width of {p.name}: the product of two such "
                        f"matrices has no higher rank; lower it, or train in full (rank 0)"
                    )
