"""Whose ops the model calls, where torch has them too: `exact`, on the tree, or `fast`, inexact. All else is one code."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch

from kernels import inexact, ops
from kernels.model.formats import FORMATS, PLAIN, Format

Numerics = Literal["exact", "fast"]


Seen = Callable[..., None]
"""seen(layer, op, *outputs): is shown what each op of a layer returns, [T, ...] with a row a token; layer -1 is what comes
before the first layer, and the number of layers what comes after the last. It changes nothing."""


def not_seen(layer: int, op: str, *outputs: torch.Tensor) -> None:
    """Does nothing: the hook where nobody looks."""


@dataclass(frozen=True)
class Operations:
    """Holds functions of the same signatures, which are those of `kernels.ops`, and who is shown what they return."""

    matmul: Callable[..., torch.Tensor]
    project: Callable[..., torch.Tensor]  # the matmul of a projection, in the model's format
    attention: Callable[..., torch.Tensor]
    linear_logprob: Callable[..., torch.Tensor]
    expert_matmul: Callable[..., torch.Tensor]
    seen: Seen = not_seen


OPERATIONS: Mapping[str, Operations] = MappingProxyType(
    {
        "exact": Operations(ops.matmul, ops.matmul, ops.attention, ops.linear_logprob, ops.expert_matmul),
        "fast": Operations(
            inexact.matmul, inexact.matmul, inexact.attention, inexact.linear_logprob, inexact.expert_matmul
        ),
    }
)
"""By Numerics. What is promised of a run is promised of `exact`."""


@cache
def operations(numerics: Numerics, format: Format) -> Operations:
    """Returns the ops of a model of this numerics, whose projections are of this format."""
    own = OPERATIONS[numerics]
    return own if format == PLAIN else replace(own, project=FORMATS[format].project)
