"""A tensor of the model: its shape, its shard, and its Hugging Face names."""

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch

from kernels.ops.quantize import BLOCK
from kernels.tree import Shard

Target = Literal["attention", "mlp", "experts", "head"]
"""What adapters are asked for by: the matrices of a block, or the head."""


SCALES = "_scales"
"""What the name of a quantized weight's scales ends in, after that of the weight."""
SCALES_IN_FILES = "_scale_inv"
"""The same in a published file. It is the factor that a value is multiplied with, in spite of its name."""


@dataclass(frozen=True)
class Parameter:
    """Describes one tensor as the model holds it: one or several Hugging Face tensors stacked by rows, or, with a `stripe`,
    pairs of them whose rows stand in turns of so many, those of the first of a pair before those of the second.

    `trained`, `served` and `saved` say in which lists of `kernels.model.parameters` it stands: whether the optimizer
    changes it, whether an engine holds it, whether a model directory has it."""

    name: str
    sections: tuple[
        int, ...
    ]  # rows that shards cut, each on its own; of each Hugging Face tensor, if `tensors` says no other
    columns: int  # 0 for a vector
    hf_names: tuple[str, ...]
    axis: int | None  # tensor-parallel axis; None: every rank holds it whole
    padding: int = 0  # the last of these rows, zeros that no file has
    tensors: tuple[int, ...] = ()  # rows of each Hugging Face tensor, where they are not the sections
    stripe: int = 0
    to_stream: bool = False  # its product is added to the residual stream
    target: Target | None = None  # by which an adapter of it is asked for; None: it can have none
    trained: bool = True
    served: bool = True
    saved: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape that is held, padding included."""
        return (sum(self.sections), self.columns) if self.columns else (sum(self.sections),)

    @property
    def stored(self) -> tuple[int, ...]:
        """Counts the rows of each Hugging Face tensor in a file."""
        return self.tensors or (*self.sections[:-1], self.sections[-1] - self.padding)

    @property
    def matrices(self) -> tuple[int, ...]:
        """Counts the rows that are held of each Hugging Face tensor, padding included."""
        return self.tensors or self.sections

    def owners(self, rows: range) -> list[tuple[int, slice | torch.Tensor]]:
        """Returns which of `rows`, counted from their first, are of which Hugging Face tensor: (its number, where)."""
        out: list[tuple[int, slice | torch.Tensor]] = []
        if self.stripe:
            pair = 2 * self.tensors[0]
            for first in range(rows.start // pair * pair, rows.stop, pair):
                own = torch.arange(max(first, rows.start), min(first + pair, rows.stop))
                second = own // self.stripe % 2 == 1
                for turn, mine in enumerate((own[~second], own[second])):
                    if len(mine):
                        out.append((first // pair * 2 + turn, mine - rows.start))
            return out
        stop = 0
        for number, held in enumerate(self.matrices):
            start, stop = stop, stop + held
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                out.append((number, slice(first - rows.start, last - rows.start)))
        return out

    @property
    def elements(self) -> int:
        """Counts how many numbers a file has of it."""
        return sum(self.stored) * max(self.columns, 1)

    @property
    def held(self) -> int:
        """Counts how many numbers a shard of one holds of it, padding included."""
        return prod(self.shape)

    @property
    def projection(self) -> bool:
        """Says whether a format of `kernels.model.formats` may quantize it: a matrix between norm and residual stream."""
        return self.target not in (None, "head")

    @property
    def scales(self) -> "Parameter":
        """Describes the scales of its blocks where it is quantized: a tensor that is cut as it is."""
        sections, columns = tuple(rows // BLOCK for rows in self.sections), self.columns // BLOCK
        hf = tuple(name + SCALES_IN_FILES for name in self.hf_names)
        return replace(self, name=self.name + SCALES, sections=sections, columns=columns, hf_names=hf, target=None)

    def of_layer(self, index: int) -> "Parameter":
        """Names a block's parameter as one of layer `index`."""
        hf = tuple(f"model.layers.{index}.{name}" for name in self.hf_names)
        return replace(self, name=f"layers.{index}.{self.name}", hf_names=hf)

    def from_files(self, rows: torch.Tensor) -> torch.Tensor:
        """Lays out the rows of all files as they are held: in stripes, with the rows that no file has."""
        if self.stripe:
            return self._swapped(rows, (2, self.stored[0] // self.stripe))
        return torch.cat([rows, rows.new_zeros(self.padding, *rows.shape[1:])]) if self.padding else rows

    def to_files(self, held: torch.Tensor) -> torch.Tensor:
        """Undoes `from_files`."""
        if self.stripe:
            return self._swapped(held, (self.stored[0] // self.stripe, 2))
        return held[: sum(self.stored)]

    def _swapped(self, rows: torch.Tensor, turns: tuple[int, int]) -> torch.Tensor:
        return rows.view(-1, *turns, self.stripe, self.columns).transpose(1, 2).reshape(-1, self.columns)

    def shard(self, whole: torch.Tensor, shard: Shard) -> torch.Tensor:
        """Cuts this rank's part, contiguous: each section on its own, so that a rank holds whole heads."""
        if self.axis is None:
            return whole.contiguous()
        if self.axis == 1:
            return whole[:, shard.range(self.columns, self.name)].contiguous()
        return torch.cat([part[shard.range(len(part), self.name)] for part in whole.split(self.sections)])

    def part(self, shard: Shard) -> "Parameter":
        """Describes what `shard` holds of it."""
        if self.axis == 0:
            sections = tuple(shard.part(s, self.name) for s in self.sections)
            return replace(self, sections=sections, padding=0, tensors=())
        return replace(self, columns=shard.part(self.columns, self.name)) if self.axis == 1 else self
