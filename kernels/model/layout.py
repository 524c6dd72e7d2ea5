"""Where the tokens of one forward pass stand, and where their keys and values are kept.

Prefill, chunked prefill, decoding and training are the same forward under different layouts. Serving keeps keys in pages;
training attends to its own activations through the identity page table (pages of one token).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from kernels.ops.attention import Pages


def on_device(t: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies a CPU tensor there, without waiting for what the device is doing."""
    if torch.device(device).type == "cpu":
        return t
    return t.pin_memory().to(device, non_blocking=True)


def _put(a: np.ndarray, dtype: type, device: torch.device | str) -> torch.Tensor:
    return on_device(torch.from_numpy(a.astype(dtype)), device)


def _offsets(lengths: Sequence[int]) -> np.ndarray:
    """Returns [0, the first length, the first two, ...]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True)
class Layout:
    """Describes T tokens of S sequences, side by side."""

    pages: Pages  # positions and page table
    slots: torch.Tensor  # int64 [T], the key-value row that each token writes
    groups: torch.Tensor  # int64 [G + 1], token offsets of the gradient's leaves; [0, T] where there is no gradient
    parts: tuple[tuple[slice, Pages], ...] = ()  # tokens whose attention is a call of its own; none: all of them in one
    wanted: torch.Tensor | None = None  # int64 [R], the tokens whose outputs are read, keys being in pages; None: all

    @property
    def positions(self) -> torch.Tensor:
        """Returns the position of each token in its sequence, int32 [T]."""
        return self.pages.position

    @classmethod
    def packed(cls, lengths: Sequence[int], group_sizes: Sequence[int], device: torch.device | str = "cpu") -> "Layout":
        """Lays out whole sequences without padding: `lengths` tokens each, consecutive `group_sizes` sequences a
        gradient leaf."""
        starts, total = _offsets(lengths), sum(lengths)
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        table = np.minimum(starts[:-1, None] + np.arange(max(lengths)), total - 1)
        pages = Pages(
            table=_put(table, np.int32, device),
            size=1,
            sequence=_put(sequence, np.int32, device),
            position=_put(np.arange(total) - starts[sequence], np.int32, device),
            starts=_put(starts, np.int64, device),
            packed=True,
        )
        groups = starts[_offsets(group_sizes)]
        return cls(pages=pages, slots=torch.arange(total, device=device), groups=_put(groups, np.int64, device))

    @classmethod
    def paged(
        cls,
        spans: Sequence[tuple[int, int]],
        tables: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str = "cpu",
    ) -> "Layout":
        """Lays out the next tokens of each sequence, positions `span[0] <= p < span[1]`, and the pages it owns.

        Consecutive spans of one kind are a part: single tokens (decoding), beginnings (they attend to their own activations and
        read no page), and the rest. Each has the kernel that is made for it, and all have the same bits."""
        starts = _offsets([stop - start for start, stop in spans])
        sequence = np.repeat(np.arange(len(spans)), np.diff(starts))
        position = np.concatenate([np.arange(start, stop) for start, stop in spans])
        table = np.zeros((len(tables), max(map(len, tables))), np.int32)
        for line, owned in zip(table, tables, strict=True):
            line[: len(owned)] = owned
        slots = table[sequence, position // page_size].astype(np.int64) * page_size + position % page_size
        pages = Pages(
            table=_put(table, np.int32, device),
            size=page_size,
            sequence=_put(sequence, np.int32, device),
            position=_put(position, np.int32, device),
            starts=_put(starts, np.int64, device),
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
        return cls(pages, _put(slots, np.int64, device), _put(starts[[0, -1]], np.int64, device), tuple(parts))

    def ends(self, rows: torch.Tensor) -> "Layout":
        """Returns the ends of the tokens `rows`, int64 [R], where pages hold the keys of all: each for itself, as in
        decoding."""
        pages = self.pages
        starts = torch.arange(len(rows) + 1, device=rows.device)
        alone = Pages(pages.table, pages.size, pages.sequence[rows], pages.position[rows], starts)
        return Layout(alone, self.slots[rows], self.groups)

    @staticmethod
    def kind(span: tuple[int, int]) -> str:
        """Names the kind of a span; spans of a kind are best side by side: see `paged`."""
        start, stop = span
        return "decoding" if stop - start == 1 else "rest" if start else "beginning"


Rows = tuple[torch.Tensor, torch.Tensor]
"""Keys and values [rows, kv_heads, head_dim]."""

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Pages, float], torch.Tensor]
"""`kernels.ops.attention`, or one of its signature."""


class PagedCache:
    """Holds, for serving, keys and values of every layer in rows of all pages, kept between steps."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keeps both, [layers, pages * page_size, kv_heads, head_dim]."""
        self.keys, self.values = keys, values

    def rows(self, layer: int) -> Rows:
        """Returns all rows of a layer, in place."""
        return self.keys[layer], self.values[layer]


def attend(attention: Attention, q: torch.Tensor, own: Rows, held: Rows, layout: Layout, scale: float) -> torch.Tensor:
    """Returns the attention of q [T, heads, head_dim] to `held`, the rows of the pages of `layout`; a part that is
    packed attends to its `own` keys and values, those of the same tokens."""
    if not layout.parts:
        return attention(q, *held, layout.pages, scale)
    out = []
    for tokens, pages in layout.parts:
        keys, values = (own[0][tokens], own[1][tokens]) if pages.packed else held
        out.append(attention(q[tokens], keys, values, pages, scale))
    return out[0] if len(out) == 1 else torch.cat(out)
