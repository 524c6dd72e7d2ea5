"""Where the tokens of one forward pass stand, and where their keys and values are kept.

Prefill, chunked prefill, decoding and training are the same forward under different layouts. Serving keeps keys in pages;
training attends to its own activations through the identity page table (pages of one token).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
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
    parts: tuple[tuple[slice, Pages], ...] = ()  # tokens whose attention is a call of its own; none: all of them in one
    wanted: torch.Tensor | None = None  # int64 [R], the tokens whose outputs are read, keys being in pages; None: all

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
            table=on_device(table.clamp(max=total - 1).int(), device),
            size=1,
            sequence=on_device(sequence.int(), device),
            position=on_device(position.int(), device),
            starts=on_device(starts, device),
            packed=True,
        )
        return cls(pages=pages, slots=torch.arange(total, device=device), groups=on_device(starts[ends], device))

    @classmethod
    def paged(
        cls,
        spans: Sequence[tuple[int, int]],
        tables: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "Layout":
        """For each sequence its next tokens, positions `span[0] <= p < span[1]`, and the pages it owns.

        Consecutive spans of one kind are a part: single tokens (decoding), beginnings (they attend to their own activations and
        read no page), and the rest. Each has the kernel that is made for it, and all have the same bits."""
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
        parts, first = [], 0
        for kind, same in groupby(spans, key=cls.kind):
            last = first + len(list(same))
            tokens = slice(int(starts[first]), int(starts[last]))
            if kind == "beginning":
                part = cls.packed([stop for _, stop in spans[first:last]], [last - first], device).pages
            else:
                part = Pages(
                    pages.table[first:last],
                    page_size,
                    pages.sequence[tokens] - first,
                    pages.position[tokens],
                    pages.starts[first : last + 1] - int(starts[first]),
                )
            parts.append((tokens, part))
            first = last
        return cls(pages, on_device(slots, device), on_device(starts[[0, -1]], device), tuple(parts))

    def ends(self, rows: torch.Tensor) -> "Layout":
        """Of the tokens `rows`, int64 [R], where pages hold the keys of all: each for itself, as in decoding."""
        pages = self.pages
        starts = torch.arange(len(rows) + 1, device=rows.device)
        alone = Pages(pages.table, pages.size, pages.sequence[rows], pages.position[rows], starts)
        return Layout(alone, self.slots[rows], self.groups)

    @staticmethod
    def kind(span: tuple[int, int]) -> str:
        """Spans of a kind are best side by side: see `paged`."""
        start, stop = span
        return "decoding" if stop - start == 1 else "rest" if start else "beginning"


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Pages, float], torch.Tensor]
"""`kernels.ops.attention`, or one of its signature."""


class KeyValues(Protocol):
    """Keys and values of every layer."""

    def keep(self, layer: int, keys: torch.Tensor, values: torch.Tensor, layout: Layout) -> None:
        """Takes keys and values of the current tokens [T, kv_heads, head_dim]."""
        ...

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: Layout,
        attention: Attention,
        scale: float,
    ) -> torch.Tensor:
        """The attention of q [T, heads, head_dim] to the keys and values just kept, and to those before them."""
        ...


class Activations:
    """Training: the keys are the activations themselves."""

    def keep(self, layer: int, keys: torch.Tensor, values: torch.Tensor, layout: Layout) -> None:
        pass

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: Layout,
        attention: Attention,
        scale: float,
    ) -> torch.Tensor:
        return attention(q, keys, values, layout.pages, scale)


class PagedCache:
    """Serving: rows of all pages, kept between steps."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Both [layers, pages * page_size, kv_heads, head_dim]."""
        self.keys, self.values = keys, values

    def keep(self, layer: int, keys: torch.Tensor, values: torch.Tensor, layout: Layout) -> None:
        store_rows(self.keys[layer], self.values[layer], layout.slots, keys, values)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: Layout,
        attention: Attention,
        scale: float,
    ) -> torch.Tensor:
        rows = self.keys[layer], self.values[layer]
        out = []
        for tokens, pages in layout.parts or ((slice(None), layout.pages),):
            held = (keys[tokens], values[tokens]) if pages.packed else rows
            out.append(attention(q[tokens], *held, pages, scale))
        return out[0] if len(out) == 1 else torch.cat(out)
