"""What a publication carries: all weights as they are served or, where these are frozen weights with adapters merged into them,
the frozen ones once, and from then on A and B alone, which every receiver merges by the trainer's own op."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.model import ModelConfig, Parameter, served
from kernels.ops import merge_low_rank
from kernels.tree import Shard
from kernels.weights.reshard import shard_rows

Kind = Literal["weights", "frozen", "factors"]
"""weights: as they are served; frozen: those under the adapters, all others with them; factors: A and B."""
_ROWS = 1 << 13  # of a weight that are merged at once: bounds what a merge holds beside it


@dataclass(frozen=True)
class Cargo:
    """Lists the parameters that a publication carries, in order, and the dtype they travel in."""

    parameters: tuple[Parameter, ...]
    dtype: torch.dtype


def cargo(kind: Kind, config: ModelConfig, dtype: torch.dtype) -> Cargo:
    """Returns what a publication of this kind carries of a model that is served in `dtype`. A and B travel as the float32
    numbers that the trainer merges, cut as the weight is: a shard gets its rows of B or its columns of A."""
    if kind != "factors":
        return Cargo(tuple(served(config)), dtype)
    adapter = config.adapter
    assert adapter is not None
    return Cargo(tuple(one for parameter in adapted(config) for one in adapter.tensors(parameter)), torch.float32)


def adapted(config: ModelConfig) -> list[Parameter]:
    """Lists the weights that have an adapter."""
    return [p for p in served(config) if config.adapter and config.adapter.rank(p)]


def factors_are_less(config: ModelConfig, dtype: torch.dtype) -> bool:
    """Tells whether A and B are fewer bytes than the weights that they change."""
    factors, weights = cargo("factors", config, dtype), cargo("weights", config, dtype)
    sizes = [sum(p.held for p in one.parameters) * one.dtype.itemsize for one in (factors, weights)]
    return sizes[0] < sizes[1]


def merge_rows(
    parameter: Parameter,
    rows: range,
    merged: torch.Tensor,
    frozen: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    first: int = 0,
) -> None:
    """Writes frozen + scale b a, rounded once, into `merged`: each of `rows` of a weight, which frozen, b and merged hold, by
    the a of its matrix. a [matrices r, K] has those from number `first` on."""
    rank = b.shape[1]
    for number, where in parameter.owners(rows):
        of_matrix = a[(number - first) * rank : (number - first + 1) * rank]
        if isinstance(where, torch.Tensor):  # rows of two matrices stand in turns
            here = where.to(merged.device)
            given = (
                frozen[where.to(frozen.device)].to(merged.device),
                of_matrix,
                b[where.to(b.device)].to(merged.device),
            )
            merged[here] = merge_low_rank(*given, scale, merged.dtype)
            continue
        for start in range(where.start, where.stop, _ROWS):
            some = slice(start, min(start + _ROWS, where.stop))
            given = frozen[some].to(merged.device), of_matrix, b[some].to(merged.device)
            merged[some].copy_(merge_low_rank(*given, scale, merged.dtype))


def merge_part(
    config: ModelConfig,
    shard: Shard,
    parameter: Parameter,
    merged: torch.Tensor,
    frozen: Mapping[str, torch.Tensor],
    factors: Mapping[str, torch.Tensor],
) -> None:
    """Fills a shard's part of one weight, `merged`, from what it holds of the frozen weights and of A and B: the trainer's
    bits."""
    under = frozen[parameter.name]
    if not (config.adapter and config.adapter.rank(parameter)):
        merged.copy_(under)
        return
    of_a, of_b = (factors[p.name] for p in config.adapter.tensors(parameter))
    cut = config.adapter.tensors(parameter)[0].axis == 0  # of an A that is cut a shard has the part of its experts
    first = shard.rank * len(parameter.matrices) // shard.size if cut else 0
    for rows, at in shard_rows(parameter, shard):
        here = slice(at, at + len(rows))
        given = merged[here], under[here], of_a, of_b[here], config.adapter.scale(parameter)
        merge_rows(parameter, rows, *given, first)
