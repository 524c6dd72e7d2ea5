"""Where the tokens of one forward pass stand, and where their keys and values are kept.

Prefill, chunked prefill, decoding and training are the same forward under different layouts. Serving keeps keys in pages;
training attends to its own activations through the identity page table (pages of one token).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.ops import store_rows
from kernels.ops.attention import Pages


def on_device(t: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor there, without waiting for what the device is doing."""
    if torch.device(device).type == "cpu":
        return t
    return t.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Layout:
    """T tokens of S sequences, side by side."""

    pages: Pages  # positions and page table
    slots: torch.Tensor  # int64 [T], the key-value row that each token writes
    groups: torch.Tensor  # int64 [G + 1], token offsets of the gradient's leaves; [0, T] where there is no gradient

    @property
    def positions(self) -> torch.Tensor:
        return self.pages.position

    @classmethod
    def packed(cls, lengths: Sequence[int], group_sizes: Sequence[int], device: torch.device | str = "cpu") -> "Layout":
        """Whole sequences without padding: `lengths` tokens each, consecutive `group_sizes` sequences a gradient leaf."""
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        starts[1:] = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
        total = int(starts[-1])
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), starts.diff())
        position = torch.arange(total) - starts[sequence]
        table = starts[:-1, None] + torch.arange(max(lengths))
        ends = torch.zeros(len(group_sizes) + 1, dtype=torch.int64)
        ends[1:] = torch.tensor(group_sizes, dtype=torch.int64).cumsum(0)
        pages = Pages(
            table=table.clamp(max=total - 1).int().to(device),
            size=1,
            sequence=sequence.int().to(device),
            position=position.int().to(device),
            starts=starts.to(device),
            packed=True,
        )
        return cls(pages=pages, slots=torch.arange(total, device=device), groups=starts[ends].to(device))

    @classmethod
    def paged(
        cls,
        spans: Sequence[tuple[int, int]],
        tables: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "Layout":
        """For each sequence its next tokens, positions `span[0] <= p < span[1]`, and the pages it owns."""
        starts = torch.zeros(len(spans) + 1, dtype=torch.int64)
        starts[1:] = torch.tensor([stop - start for start, stop in spans], dtype=torch.int64).cumsum(0)
        sequence = torch.repeat_interleave(torch.arange(len(spans)), starts.diff())
        first = torch.tensor([start for start, _ in spans], dtype=torch.int64)
        position = torch.arange(int(starts[-1])) - starts[sequence] + first[sequence]
        width = max(map(len, tables))
        table = torch.tensor([[*owned, *[0] * (width - len(owned))] for owned in tables], dtype=torch.int32)
        slots = table[sequence, position // page_size].long() * page_size + position % page_size
        pages = Pages(
            table=on_device(table, device),
            size=page_size,
            sequence=on_device(sequence.int(), device),
            position=on_device(position.int(), device),
            starts=on_device(starts, device),
        )
        return cls(pages=pages, slots=on_device(slots, device), groups=on_device(starts[[0, -1]], device))


class KeyValues(Protocol):
    """Keys and values of every layer."""

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes those of the current tokens [T, kv_heads, head_dim]; returns all rows that the page table may name."""
        ...


class Activations:
    """Training: the keys are the activations themselves."""

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values


class PagedCache:
    """Serving: rows of all pages, kept between steps."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Both [layers, pages * page_size, kv_heads, head_dim]."""
        self.keys, self.values = keys, values

    def update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, layout: Layout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        store_rows(self.keys[layer], self.values[layer], layout.slots, keys, values)
        return self.keys[layer], self.values[layer]
