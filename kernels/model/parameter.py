"""A tensor of the model: its shape, its shard, and its Hugging Face names."""

from dataclasses import dataclass, replace
from math import prod

import torch

from kernels.tree import Shard


@dataclass(frozen=True)
class Parameter:
    """Describes one tensor as the model holds it: one or several Hugging Face tensors stacked by rows.

    `trained`, `served` and `saved` say in which lists of `kernels.model.parameters` it stands: whether the optimizer changes it,
    whether an engine holds it, whether a model directory has it."""

    name: str
    sections: tuple[int, ...]  # rows of each Hugging Face tensor
    columns: int  # 0 for a vector
    hf_names: tuple[str, ...]
    axis: int | None  # tensor-parallel axis; None: every rank holds it whole
    padding: int = 0  # the last of these rows, zeros that no file has
    trained: bool = True
    served: bool = True
    saved: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that is held, padding included."""
        return (sum(self.sections), self.columns) if self.columns else (sum(self.sections),)

    @property
    def stored(self) -> tuple[int, ...]:
        """Rows of each Hugging Face tensor in a file."""
        return (*self.sections[:-1], self.sections[-1] - self.padding)

    @property
    def elements(self) -> int:
        """How many numbers a file has of it."""
        return sum(self.stored) * max(self.columns, 1)

    @property
    def held(self) -> int:
        """How many numbers a shard of one holds of it, padding included."""
        return prod(self.shape)

    def of_layer(self, index: int) -> "Parameter":
        """Names a block's parameter as one of layer `index`."""
        hf = tuple(f"model.layers.{index}.{name}" for name in self.hf_names)
        return replace(self, name=f"layers.{index}.{self.name}", hf_names=hf)

    def pad(self, stored: torch.Tensor) -> torch.Tensor:
        """Adds the rows that no file has to those in files."""
        return torch.cat([stored, stored.new_zeros(self.padding, *stored.shape[1:])]) if self.padding else stored

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
            return replace(self, sections=tuple(shard.part(s, self.name) for s in self.sections), padding=0)
        return replace(self, columns=shard.part(self.columns, self.name)) if self.axis == 1 else self
