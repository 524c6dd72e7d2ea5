"""The trainer's side of a publication: each rank hands over its own rows, rounded to the served dtype, bucket by bucket."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist

from kernels.host.place import Place
from kernels.model import ModelConfig, served
from kernels.weights.bucket import SharedBucket, Ticket, Wire, wait_for_wires
from kernels.weights.cargo import Cargo, cargo
from kernels.weights.fingerprint import fingerprint, unsigned
from kernels.weights.reshard import Bucket, Piece, buckets, extent
from kernels.weights.routes import Recipient, wired

_AT_ONCE = 1 << 24  # elements of the masters that are rounded at once for their fingerprint


@dataclass(frozen=True)
class Sent:
    """Says what a rank published."""

    sums: list[list[int]]  # fingerprints of what it serves, by its masters: [parameter][shard], each below 2^64
    crossed: dict[tuple[str, str], int]  # bytes that it sent to other hosts: (its own, the other)
    packed: int  # bytes that it put into buckets


def _half(plan: list[Bucket], dtype: torch.dtype) -> int:
    """Bytes of the largest bucket, a multiple of 16."""
    return max(16, *(-(-extent(bucket, dtype).stop // 16) * 16 for bucket in plan))


class Publisher:
    """Publishes from rank `rank` of `size`. One publication at a time: `begin`; for each bucket `pack`, then `send` while the
    receivers `take`; `finish`. Holds two halves of a bucket, and no parameter whole."""

    def __init__(self, model: ModelConfig, rank: int, size: int, dtype: torch.dtype, place: Place, store: str) -> None:
        """`rank` of the `size` that hold the model's rows once. `place`: of this rank's tensors. `store`: of a TCPStore that
        the recipients reach, tcp://host:port."""
        self.model, self.rank, self.size, self.dtype, self.place, self.store = model, rank, size, dtype, place, store
        self.device = "cpu" if place.card is None else "cuda"
        self._wires: dict[str, Wire] = {}
        self._bucket: SharedBucket | None = None
        self._under_way = False

    def begin(
        self,
        name: str,
        rows: Mapping[str, torch.Tensor],
        recipients: Sequence[Recipient],
        shards: int,
        half: int,
        factors: Cargo | None = None,
    ) -> tuple[Ticket, int]:
        """Begins a publication. `name`: of this publication, on all ranks of both sides; new. `rows`: this rank's of every
        parameter, float32, which must stay as they are until `finish`. `recipients`: whom this rank and those with the other
        rows serve; `shards`: the tensor-parallel size of all. `factors`: A and B, if these are sent in the place of what they
        are merged into; `rows` then have them too. Returns how to open the bucket, and how many buckets there will be."""
        if self._under_way:
            self.cut()
        self._name = name
        self._rows, self._far = rows, wired(self.place, recipients)
        whole = cargo("weights", self.model, self.dtype)
        self._apart, self._cargo = factors is not None, factors or whole
        self._plan, self._promises = (
            buckets(one.parameters, self.rank, self.size, shards, half, one.dtype) for one in (self._cargo, whole)
        )
        self._bucket = SharedBucket(_half(self._plan, self._cargo.dtype), self.place)
        self._crossed: dict[tuple[str, str], int] = {}
        self._packed = 0
        self._order = {p.name: i for i, p in enumerate(served(self.model))}
        self._sums = torch.zeros(len(self._order), shards, dtype=torch.int64, device=self.device)
        self._sending: tuple[list[dist.Work], list[dist.Work]] = [], []
        self._under_way = True
        return self._bucket.ticket, len(self._plan)

    @torch.no_grad()
    def pack(self, number: int) -> None:
        """Fills a half with bucket `number`, if there is one; readers of the same card may open it then."""
        assert self._bucket is not None
        self._bucket.hide()
        sending = self._sending[number % 2]
        while sending:
            sending.pop().wait()
        half = self._bucket.halves[number % 2]
        for piece in self._pieces(number):
            held = self._rows[piece.parameter.name]
            rows = held.view(len(held), -1)[piece.source : piece.source + piece.rows, piece.columns]
            self.fill(piece.of(half, self._cargo.dtype), rows)
            self._packed += piece.bytes(self._cargo.dtype)
            if not self._apart:
                self._promise(piece)
        if self.device == "cuda":
            self._wait()

    def fill(self, place: torch.Tensor, rows: torch.Tensor) -> None:
        """Rounds masters to the served dtype, into the bucket."""
        place.copy_(rows.to(self.device))

    def _promise(self, piece: Piece) -> None:
        """Adds the fingerprint of what the trainer's own forward pass reads of these masters: rounded anew, never read from the
        bucket, so that a fault of the bucket's rounding is one of the publication."""
        held = self._rows[piece.parameter.name]
        rows = held.view(len(held), -1)[piece.source : piece.source + piece.rows, piece.columns]
        step = max(1, _AT_ONCE // rows.shape[1])
        parts = [
            fingerprint(some.to(self.device).to(self.dtype).contiguous(), piece.row + i * step, piece.columns.start)
            for i, some in enumerate(rows.split(step))
        ]
        self._sums[self._order[piece.parameter.name], piece.shard.rank] += torch.stack(parts).sum()

    def _wait(self) -> None:
        if not self._far:
            torch.cuda.current_stream().synchronize()
            return
        try:
            wait_for_wires()
        except TimeoutError:
            self.cut()
            raise

    def send(self, number: int) -> None:
        """Sends to the recipients on other cards, and to one of each shard on other hosts, their part of bucket `number`."""
        assert self._bucket is not None
        half, pieces = self._bucket.halves[number % 2], self._pieces(number)
        for to in self._far:
            if theirs := [p for p in pieces if p.shard.rank == to.shard]:
                if to.name not in self._wires:
                    wire = Wire(f"{self._name} {to.name} {self.rank}", self.store, sender=True, place=self.place)
                    self._wires[to.name] = wire
                part = half[extent(theirs, self._cargo.dtype)]
                self._sending[number % 2].append(self._wires[to.name].send(part))
                if to.place.host != self.place.host:
                    way = (self.place.host, to.place.host)
                    self._crossed[way] = self._crossed.get(way, 0) + part.numel()

    def _pieces(self, number: int) -> Bucket:
        return self._plan[number] if number < len(self._plan) else []

    def finish(self) -> Sent:
        """Returns what was sent, once it is. Frees the bucket."""
        if self._apart:
            for piece in chain.from_iterable(self._promises):
                self._promise(piece)
        for works in self._sending:
            for work in works:
                work.wait()
        if self.device == "cuda":
            self._wait()
        sums = [[unsigned(value) for value in row] for row in self._sums.tolist()]
        self._bucket, self._rows, self._under_way = None, {}, False
        return Sent(sums, self._crossed, self._packed)

    def cut(self) -> None:
        """Ends a publication that failed, on any rank: here, and the wires, whose other ends may still wait."""
        for wire in self._wires.values():
            wire.cut()
        self._wires, self._bucket, self._rows, self._under_way = {}, None, {}, False


class PublishingRank:
    """Does what the driver calls of a process that has a publisher, once it has begun a publication."""

    publisher: Publisher

    def pack(self, number: int) -> None:
        """Rounds this rank's rows of bucket `number` to the served dtype and writes them there."""
        self.publisher.pack(number)

    def send(self, number: int) -> None:
        """Sends bucket `number` to the recipients on other cards and hosts."""
        self.publisher.send(number)

    def end_publication(self) -> Sent:
        """Ends the publication; returns the fingerprints of this rank's rows, and what crossed the network."""
        return self.publisher.finish()

    def cut(self) -> None:
        """Ends a publication that failed."""
        self.publisher.cut()
