"""Finds the first layer and op at which two recordings of the same tokens part."""

from dataclasses import dataclass

import numpy as np
import torch

from rl.replay.recording import Recording, Stage
from trainer.batch import Batch


@dataclass(frozen=True)
class Parting:
    """Says how much of two recordings was compared, and where they first differ."""

    layers: int
    ops: int  # stages, each an op of a layer, that both have
    rows: int  # rows of all stages that both have
    differing: int  # of these
    equal: int  # stages before the first that differs
    stage: Stage | None = None  # the first that differs; None: nowhere
    stage_rows: int = 0  # rows of that stage that differ
    token: int = 0  # the first of them, in the batch
    sequence: int = 0
    position: int = 0
    element: str = ""  # the first element of its row that differs, with both values and bit patterns

    @property
    def where(self) -> str:
        """Names the stage."""
        if self.stage is None:
            return "nowhere"
        layer, op = self.stage
        return op if layer < 0 or layer >= self.layers else f"layer {layer}, {op}"

    def told(self, names: tuple[str, str]) -> list[str]:
        """Says it in lines; `names`: of the two sides."""
        compared = f"{self.differing:,} of {self.rows:,} rows differ in {self.layers} layers, {self.ops} ops"
        if self.stage is None:
            return [compared]
        return [
            compared,
            f"{names[0]} and {names[1]} part at {self.where}: sequence {self.sequence}, position {self.position}; "
            f"{self.stage_rows:,} rows of this op differ, and all of the {self.equal} ops before it are equal",
            *([f"there {self.element}"] if self.element else []),
        ]


def part(a: Recording, b: Recording, batch: Batch, layers: int) -> Parting:
    """Compares what both recordings hold of the tokens of `batch`, stage by stage in the order of `a`."""
    stages = [stage for stage in a.digests if stage in b.digests]
    stages.sort(key=lambda stage: stage[0])  # the layers' own order; a sort keeps that of the ops in one
    rows = differing = 0
    first: Parting | None = None
    for number, stage in enumerate(stages):
        mine, theirs = a.digests[stage], b.digests[stage]
        both = (mine != 0) & (theirs != 0)
        apart = np.flatnonzero(both & (mine != theirs))
        rows, differing = rows + int(both.sum()), differing + apart.size
        if apart.size and first is None:
            token = int(apart[0])
            sequence = int(np.searchsorted(np.cumsum(batch.lengths), token, side="right"))
            position = token - int(batch.lengths[:sequence].sum())
            first = Parting(layers, 0, 0, 0, number, stage, apart.size, token, sequence, position)
    if first is None:
        return Parting(layers, len(stages), rows, differing, len(stages))
    named = (first.stage, first.stage_rows, first.token, first.sequence, first.position)
    return Parting(layers, len(stages), rows, differing, first.equal, *named)


def element(a: Recording, b: Recording, names: tuple[str, str]) -> str:
    """Names the first element in which the watched rows differ, with both values and bit patterns; "" where none does."""
    for output, (mine, theirs) in enumerate(zip(a.row, b.row, strict=True)):
        x, y = (_patterns(t) for t in (mine, theirs))
        if x.shape == y.shape and (apart := np.flatnonzero(x != y)).size:
            at = int(apart[0])
            of = f"output {output}, " if len(a.row) > 1 else ""
            digits = 2 * x.itemsize
            sides = [
                f"{name} {t[at].item()!r} (0x{int(bits[at]):0{digits}x})"
                for name, t, bits in zip(names, (mine, theirs), (x, y), strict=True)
            ]
            return f"{of}element {at} is {' and '.join(sides)}; {apart.size} of {x.size} elements differ"
    return ""


def _patterns(t: torch.Tensor) -> np.ndarray:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[t.element_size()]
    return t.contiguous().view(integers).numpy().view(unsigned)
