"""Whose ops the model calls, where torch has them too: `exact`, on the tree, or `fast`, inexact. All else is one code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from kernels import inexact, ops

Numerics = Literal["exact", "fast"]


@dataclass(frozen=True)
class Operations:
    """Holds functions of the same signatures, which are those of `kernels.ops`."""

    matmul: Callable[..., torch.Tensor]
    attention: Callable[..., torch.Tensor]
    linear_logprob: Callable[..., torch.Tensor]
    expert_matmul: Callable[..., torch.Tensor]


OPERATIONS: Mapping[str, Operations] = MappingProxyType(
    {
        "exact": Operations(ops.matmul, ops.attention, ops.linear_logprob, ops.expert_matmul),
        "fast": Operations(inexact.matmul, inexact.attention, inexact.linear_logprob, inexact.expert_matmul),
    }
)
"""By Numerics. What is promised of a run is promised of `exact`."""
