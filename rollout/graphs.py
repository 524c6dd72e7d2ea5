"""CUDA graphs of the decode step: the same kernels on the same weights and pages, launched as one.

A graph belongs to a batch size and a longest context, both rounded up; rows that pad the batch decode into a spare page. No bit
of a row depends on the others, so a replay has the bits of the eager step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kernels.model import Layout
from kernels.ops.attention import Pages
from kernels.tree import KEY_SPLIT

Step = Callable[[torch.Tensor, Layout, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(token ids [B] int64, layout, temperatures [B], seeds [B], greedy [B]) -> (tokens [B] int64, log-probs [B] float32)."""


@dataclass(frozen=True)
class Row:
    """What one sequence brings to a decode step."""

    token: int  # the last one
    position: int  # of that token
    pages: Sequence[int]
    temperature: float
    seed: int
    greedy: bool


def padded(count: int) -> int:
    """Batch sizes of graphs: 1, 2, 4, 8, then multiples of 8 up to 64, of 16 up to 256, and of 64 above."""
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 16 if count <= 256 else 64
    return -(-count // step) * step


class DecodeGraphs:
    """Captured on first use. `step` must launch the same kernels every time it is called with tensors of the same shapes."""

    def __init__(self, step: Step, most: int, page_size: int, spare_page: int, positions: int, device: str) -> None:
        self.step, self.page_size, self.spare_page = step, page_size, spare_page
        most, width = padded(most), -(-positions // page_size)
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self.pool: Any = None
        # One row a sequence: token, position, seed, temperature's bits, greedy; one copy to the device a step.
        self.numbers = torch.zeros(most, 5, dtype=torch.int64, device=device)
        self.table = torch.full((most, width), spare_page, dtype=torch.int32, device=device)
        self.host_numbers = torch.zeros(most, 5, dtype=torch.int64, pin_memory=True)
        self.host_table = torch.zeros(most, width, dtype=torch.int32, pin_memory=True)
        self.width = width

    def run(self, rows: Sequence[Row]) -> tuple[list[int], list[float]]:
        """(tokens, log-probs) of the next token of each row."""
        size, width = padded(len(rows)), self._width(max(row.position for row in rows) + 1)
        self._upload(rows, size, width)
        if (size, width) not in self.graphs:
            self.graphs[size, width] = self._capture(size, width)
        graph, tokens, logprobs = self.graphs[size, width]
        graph.replay()
        return tokens[: len(rows)].tolist(), logprobs[: len(rows)].tolist()

    def _width(self, tokens: int) -> int:
        """Pages of a table for so many tokens: whole splits of the attention, their number a power of two."""
        splits = -(-tokens // KEY_SPLIT)
        return min(self.width, -(-(KEY_SPLIT << (splits - 1).bit_length()) // self.page_size))

    def _upload(self, rows: Sequence[Row], size: int, width: int) -> None:
        numbers, table = self.host_numbers.numpy(), self.host_table.numpy()
        numbers[: len(rows)] = [(r.token, r.position, r.seed, 0, r.greedy) for r in rows]
        numbers[: len(rows), 3] = np.array([r.temperature for r in rows], np.float32).view(np.int32)
        numbers[len(rows) : size] = (0, 0, 0, np.float32(1).view(np.int32), 1)
        table[len(rows) : size, 0] = self.spare_page
        longest = 1
        for i, row in enumerate(rows):
            table[i, : len(row.pages)] = row.pages
            longest = max(longest, len(row.pages))
        self.numbers[:size].copy_(self.host_numbers[:size], non_blocking=True)
        self.table[:size, :longest].copy_(self.host_table[:size, :longest], non_blocking=True)

    def _body(self, size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        token, position, seed, temperature, greedy = self.numbers[:size].unbind(1)
        table, device = self.table[:size, :width].contiguous(), token.device
        sequence = torch.arange(size, dtype=torch.int32, device=device)
        starts = torch.arange(size + 1, device=device)
        slots = table.gather(1, (position // self.page_size)[:, None])[:, 0].long() * self.page_size
        pages = Pages(table, self.page_size, sequence, position.int(), starts)
        layout = Layout(pages, slots + position % self.page_size, starts[:: max(size, 1)])
        return self.step(
            token.contiguous(),
            layout,
            temperature.int().view(torch.float32),
            seed.contiguous(),
            greedy.to(torch.uint8),
        )

    def _capture(self, size: int, width: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles what is not compiled yet; what it writes, the replay writes again
            self._body(size, width)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            tokens, logprobs = self._body(size, width)
        self.pool = graph.pool()
        return graph, tokens, logprobs
