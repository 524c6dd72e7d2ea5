"""From FSDP's rows to tensor-parallel shards: which piece of which rank goes where, and in which bucket it travels.

Trainer rank w of W holds rows of every parameter (`fsdp_rows`); rollout rank s of T holds a shard (`Parameter.shard`). Both
compute the same plan, so a bucket carries no header. No rank ever holds a whole parameter for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod

import torch

from kernels.model import Parameter
from kernels.tree import Shard

_ALIGNMENT = 16  # bytes of a piece's place in a bucket


@dataclass(frozen=True)
class Piece:
    """Names rows `row` to `row + rows` of a parameter, cut to the columns of shard `shard`, at `start` of a bucket."""

    parameter: Parameter
    shard: Shard
    row: int  # in the whole parameter
    rows: int
    source: int  # of the first row, in what the trainer rank holds
    target: int  # of the first row, in what the rollout rank holds
    start: int  # bytes

    @property
    def columns(self) -> slice:
        """Returns the columns of the whole parameter; [0:1] of a vector."""
        count = max(self.parameter.columns, 1)
        return self.shard.range(count) if self.parameter.axis == 1 else slice(0, count)

    @property
    def shape(self) -> tuple[int, int]:
        """Returns (rows, columns) of the piece."""
        return self.rows, self.columns.stop - self.columns.start

    def bytes(self, dtype: torch.dtype) -> int:
        """Counts the bytes of the piece in `dtype`."""
        return prod(self.shape) * dtype.itemsize

    def of(self, data: torch.Tensor, dtype: torch.dtype, start: int | None = None) -> torch.Tensor:
        """Returns its [rows, columns] in the bytes of its bucket, or in `data` from `start` on."""
        start = self.start if start is None else start
        return data[start : start + self.bytes(dtype)].view(dtype).view(self.shape)


Bucket = list[Piece]


def fsdp_rows(rows: int, rank: int, size: int) -> range:
    """Returns the rows of rank `rank`: the first ranks hold ceil(rows / size) each."""
    part = -(-rows // size)
    return range(min(rank * part, rows), min((rank + 1) * part, rows))


def shard_rows(parameter: Parameter, shard: Shard) -> Iterator[tuple[range, int]]:
    """Returns (rows of the whole, where the first of them stands in the shard), section by section."""
    section, at = 0, 0
    for rows in parameter.sections:
        cut = shard.range(rows, parameter.name) if parameter.axis == 0 else slice(0, rows)
        yield range(section + cut.start, section + cut.stop), at
        section, at = section + rows, at + cut.stop - cut.start


def buckets(
    parameters: Sequence[Parameter], rank: int, size: int, shards: int, limit: int, dtype: torch.dtype
) -> list[Bucket]:
    """Returns all that trainer rank `rank` of `size` sends of the `parameters` to `shards` tensor-parallel ranks, in their
    order, in buckets of at most `limit` bytes, a multiple of 16 that no row exceeds. In a bucket, the pieces of
    a shard stand together."""
    out: list[Bucket] = [[]]
    used = 0
    for parameter in parameters:
        mine = fsdp_rows(parameter.shape[0], rank, size)
        for shard in (Shard(s, shards) for s in range(shards)):
            for theirs, target in shard_rows(parameter, shard):
                row, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
                while row < stop:
                    piece = Piece(parameter, shard, row, 1, row - mine.start, target + row - theirs.start, 0)
                    if limit - used < piece.bytes(dtype):
                        if not used:
                            raise ValueError(
                                f"a row of {parameter.name} is {piece.bytes(dtype)} bytes, a bucket {limit}"
                            )
                        out.append([])
                        used = 0
                    piece = replace(piece, rows=min((limit - used) // piece.bytes(dtype), stop - row))
                    out[-1].append(piece)
                    used += _aligned(piece.bytes(dtype))
                    row += piece.rows
    return [_laid_out(bucket, dtype) for bucket in out]


def _laid_out(bucket: Bucket, dtype: torch.dtype) -> Bucket:
    pieces = sorted(bucket, key=lambda piece: piece.shard.rank)
    starts = accumulate((_aligned(piece.bytes(dtype)) for piece in pieces), initial=0)
    return [replace(piece, start=start) for piece, start in zip(pieces, starts, strict=False)]


def extent(pieces: Bucket, dtype: torch.dtype) -> slice:
    """Returns the bytes of a bucket that consecutive pieces take."""
    return slice(pieces[0].start, pieces[-1].start + pieces[-1].bytes(dtype)) if pieces else slice(0, 0)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
