"""CUDA graphs of the decode step: the same kernels on the same weights and pages, launched as one.

A graph belongs to a batch size and a longest context, both rounded up; rows that pad the batch decode into a spare page.
Drafted tokens are rows like any other, of the same line of pages: a layer stores the keys of all rows before any of them
attends. Where one row draws from a part of the vocabulary, all rows pass the filters, the others at values that keep
everything. No bit of a row depends on the others, so a replay has the bits of the eager step.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels.model import Layout, on_device
from kernels.ops import Truncation
from kernels.ops.attention import Pages
from kernels.tree import KEY_SPLIT
from rollout.sampling import SamplingParams

Step = Callable[
    [torch.Tensor, Layout, torch.Tensor, torch.Tensor, torch.Tensor, Truncation], tuple[torch.Tensor, torch.Tensor]
]
"""(token ids [B] int64, layout, temperatures [B], seeds [B], greedy [B], truncation) -> (tokens [B] int64, log-probs
[B] float32)."""


class Row(NamedTuple):  # one is made for every row of every step
    """Holds what one sequence brings to a decode step: its last token, or one that is drafted after it."""

    token: int  # if its value is known
    source: int  # else which of the last step's tokens it is; -1 if it is known
    position: int  # of that token
    pages: list[int]  # only ever grows: other pages are another list
    seed: int
    sampling: SamplingParams


class PageTable:
    """Holds the page tables of the sequences that decode, on the device, a line each. Only what is new is uploaded."""

    def __init__(self, lines: int, width: int, spare_page: int, device: str) -> None:
        """A last line, of nothing but `spare_page`, is for rows that pad a batch."""
        self.table = torch.full((lines + 1, width), spare_page, dtype=torch.int32, device=device)
        self.spare = lines
        self._free = list(range(lines))
        self._lines: dict[int, _Line] = {}  # by the identity of the list of pages, which the line keeps alive

    def update(self, tables: Sequence[list[int]]) -> list[int]:
        """Returns the line of each of `tables`, which now says what the list says."""
        if sum(id(pages) not in self._lines for pages in tables) > len(self._free):
            current = set(map(id, tables))
            for old in [key for key in self._lines if key not in current]:
                self._free.append(self._lines.pop(old).number)
        lines: list[int] = []
        at: list[int] = []  # places in the table that change
        new: list[int] = []  # what stands there then
        last: list[int] | None = None
        for pages in tables:
            if pages is last:
                lines.append(lines[-1])
                continue
            last = pages
            line = self._lines.get(id(pages))
            if line is None:
                line = self._lines[id(pages)] = _Line(self._free.pop(), pages)
            if line.filled < len(pages):
                first = line.number * self.table.shape[1]
                at += range(first + line.filled, first + len(pages))
                new += pages[line.filled :]
                line.filled = len(pages)
            lines.append(line.number)
        if at:
            news = on_device(torch.tensor([at, new]), self.table.device)
            self.table.view(-1)[news[0]] = news[1].int()
        return lines


@dataclass
class _Line:
    number: int
    pages: list[int]
    filled: int = 0


def padded(count: int) -> int:
    """Rounds up to the batch sizes of graphs: 1, 2, 4, 8, then multiples of 8 up to 64, of 16 up to 256, and of 64 above."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 16 if count <= 256 else 64
    return -(-count // step) * step


class DecodeGraphs:
    """Captures a CUDA graph of `step` for each batch size, on first use. `step` must launch the same kernels every time it is
    called with tensors of the same shapes."""

    def __init__(
        self, step: Step, most: int, rows: int, page_size: int, spare_page: int, positions: int, device: str
    ) -> None:
        """`most`: sequences at once, and `rows` of them with their guesses."""
        self.step, self.page_size = step, page_size
        self.width = -(-positions // page_size)
        self.pages = PageTable(most, self.width, spare_page, device)
        self.graphs: dict[tuple[int, int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self.pool: Any = None
        # A row of a step: token, source, position, seed, greedy, line of its pages, top k; bits of temperature, top p, min p.
        self.numbers = torch.zeros(padded(rows), 10, dtype=torch.int64, device=device)
        self.last = torch.zeros(padded(rows), dtype=torch.int64, device=device)  # the tokens of the step before

    def launch(self, rows: Sequence[Row], last: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Launches a step and returns (tokens, log-probs) of the next token of each row, on the device until the next launch.
        `last`: the tokens of the step before, int64, which sources of rows refer to."""
        samplings = {id(row.sampling): row.sampling for row in rows}
        truncated = any(sampling.truncated for sampling in samplings.values())
        key = padded(len(rows)), self.width_of(max(row.position for row in rows) + 1), truncated
        if key not in self.graphs:
            self._capture(*key)
        size = key[0]
        numbers = np.empty((size, 10), dtype=np.int64)
        lines = self.pages.update([row.pages for row in rows])
        numbers[: len(rows)] = _numbers(rows, lines)
        numbers[len(rows) :] = self._nobody()
        self.numbers[:size] = on_device(torch.from_numpy(numbers), self.numbers.device)
        if last is not None:
            self.last[: len(last)] = last
        graph, tokens, logprobs = self.graphs[key]
        graph.replay()
        return tokens[: len(rows)], logprobs[: len(rows)]

    def prepare(self, batches: Sequence[int], tokens: int, truncated: bool = False) -> None:
        """Captures ahead of time what batches of these sizes need for contexts of up to `tokens`; `truncated`: for requests
        with top-k, top-p or min-p."""
        for size in sorted({padded(batch) for batch in batches}):
            for width in sorted({self.width_of(n) for n in range(1, tokens + 1)}):
                if (size, width, truncated) not in self.graphs:
                    self._capture(size, width, truncated)

    def _nobody(self) -> tuple[int, ...]:
        """The numbers of a row that pads a batch."""
        return 0, -1, 0, 0, 1, self.pages.spare, 0, *np.array([1, 1, 0], np.float32).view(np.int32).tolist()

    def width_of(self, tokens: int) -> int:
        """Counts the pages of a table for so many tokens: half a split of the attention, or whole ones, their number a power
        of two."""
        splits = -(-tokens // KEY_SPLIT)
        reach = KEY_SPLIT << (splits - 1).bit_length() if 2 * tokens > KEY_SPLIT else KEY_SPLIT // 2
        return min(self.width, -(-reach // self.page_size))

    def _body(self, size: int, width: int, truncated: bool) -> tuple[torch.Tensor, torch.Tensor]:
        token, source, position, seed, greedy, line, top_k = self.numbers[:size, :7].unbind(1)
        temperature, top_p, min_p = self.numbers[:size, 7:].T.int().view(torch.float32).contiguous()
        starts = torch.arange(size + 1, device=token.device)
        slots = self.pages.table[line, position // self.page_size].long() * self.page_size + position % self.page_size
        pages = Pages(self.pages.table[:, :width], self.page_size, line.int(), position.int(), starts)
        return self.step(
            torch.where(source < 0, token, self.last[source.clamp(min=0)]),
            Layout(pages, slots, starts[:: max(size, 1)]),
            temperature,
            seed.contiguous(),
            greedy.to(torch.uint8),
            Truncation(starts[:-1], top_k, top_p, min_p) if truncated else Truncation.none(),
        )

    def _capture(self, size: int, width: int, truncated: bool) -> None:
        self.numbers[:size] = torch.tensor(self._nobody())  # the run before the capture writes into the spare page
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles what is not compiled yet
            self._body(size, width, truncated)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _nothing_collected(), torch.cuda.graph(graph, pool=self.pool):
            tokens, logprobs = self._body(size, width, truncated)
        self.pool = graph.pool()
        self.graphs[size, width, truncated] = graph, tokens, logprobs


def _numbers(rows: Sequence[Row], lines: Sequence[int]) -> list[tuple[int, ...]]:
    """The numbers of `DecodeGraphs.numbers`. Rows of a sequence stand side by side and are sampled alike."""
    out, sampling = [], None
    for (token, source, position, _, seed, mine), line in zip(rows, lines, strict=True):
        if mine is not sampling:
            sampling, (top_k, top_p, min_p), greedy = mine, mine.filters, mine.greedy
            reals = np.array([mine.scale, top_p, min_p], np.float32).view(np.int32).tolist()
        out.append((token, source, position, seed, greedy, line, top_k, *reals))
    return out


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A CUDA graph or an event of an engine that is gone must not be freed while another graph is captured: CUDA refuses, and
    the capture fails."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
