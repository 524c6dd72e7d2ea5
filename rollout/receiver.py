"""The rollout's side of a publication: a shard's part of every bucket, checked before it is served."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch

from kernels.host.pinned import host_tensor
from kernels.host.place import Place
from kernels.model import ModelConfig, served
from kernels.weights.bucket import SharedBucket, Ticket, Wire, wait_for_wires
from kernels.weights.cargo import Kind, cargo, merge_part
from kernels.weights.reshard import Bucket, buckets, extent
from kernels.weights.routes import Recipient, Way, followers, way
from rollout.arrival import Arrival, fingerprints
from rollout.engine import Engine, InFlight
from rollout.held import weight_memory
from rollout.memory import Reclaimable


class Receiver:
    """Receives publications on one rank of an engine. One publication at a time: `begin`; `follow` where another rank of the
    host passes bytes on; `take` of every bucket; `received`, then `commit` or `abandon`.

    Where weights are frozen ones with adapters merged into them, a publication may bring the frozen ones once (`begin` with
    `frozen`, `take`, `keep`), which then stay in host memory through all sleep, and from then on A and B alone: they are merged
    here, by the trainer's op, into what the engine is to serve.

    Atomic: an engine that has weights goes on with them until `commit`; the new ones gather in a second set of the shard's
    size, which is there for the publication only. An engine without weights (not loaded yet, or asleep at level 2) has nothing
    to keep, and takes the new ones where they will be.
    """

    def __init__(self, engine: Engine, name: str, store: str, place: Place) -> None:
        """`name`: of this rank, among all. `store`: of the trainer's TCPStore, tcp://host:port. `place`: of its tensors."""
        self.engine, self.name, self.store, self.place = engine, name, store, place
        self._wires: dict[str, Wire] = {}
        self._shadow: Reclaimable | None = None
        self._halves: dict[int, list[torch.Tensor]] = {}
        self._mirror: SharedBucket | None = None
        self._arrival: Arrival | None = None  # of weights that the engine is to serve
        self._before: dict[str, torch.Tensor] = {}  # of `Arrival`, of those that it serves
        self._beside: Mapping[
            str, torch.Tensor
        ] = {}  # what arrives and is not served itself: frozen weights, or A and B
        self._under_way = False
        self._frozen: dict[str, torch.Tensor] = {}

    def begin(
        self,
        name: str,
        tickets: Sequence[Ticket],
        company: Sequence[Recipient],
        half: int,
        kind: Kind = "weights",
        model: ModelConfig | None = None,
    ) -> Ticket | None:
        """Begins a publication: `tickets` of all trainer ranks that serve the `company`, of which this rank is one; `name` and
        `half` as on their side. `kind`: what it carries; `model`: with its adapters, where these are sent. Returns the ticket
        of what it passes on to others of its place, if there are any. torch.OutOfMemoryError where there is no room for the
        second set."""
        if self._under_way:
            self.abandon()
        self._publication, self._places = name, [ticket.place for ticket in tickets]
        runner, config = self.engine.runner, self.engine.config
        me = next(to for to in company if to.name == self.name)
        self._ways = [way(place, me, company) for place in self._places]
        self._wired = [to.name for to in followers(me, self._places, company, shared=False)]
        size, self._kind, self._model = runner.group.shard.size, kind, model or runner.config
        self._cargo = cargo(kind, self._model, config.dtype)
        self._plans: list[list[Bucket]] = [
            [
                [piece for piece in bucket if piece.shard == runner.group.shard]
                for bucket in buckets(self._cargo.parameters, w, len(tickets), size, half, self._cargo.dtype)
            ]
            for w in range(len(tickets))
        ]
        self._halves = {w: tickets[w].open(self.place) for w, by in enumerate(self._ways) if by == Way(None, True)}
        self._make_room()
        self._under_way = True
        if not followers(me, self._places, company, shared=True):
            return None
        self._mirror = SharedBucket(max(16, sum(self._sizes())), self.place)
        self._divide(self._mirror.halves)
        return self._mirror.ticket

    def _make_room(self) -> None:
        """Finds the tensors that the buckets are copied to, and those that the engine is to serve."""
        runner, config = self.engine.runner, self.engine.config
        shapes = {p.name: p.part(runner.group.shard).shape for p in self._cargo.parameters}
        if self._kind == "frozen":
            if not self._frozen:
                self._frozen = {n: host_tensor(shape, config.dtype, config.device) for n, shape in shapes.items()}
            self._beside = self._frozen
            return
        memory = runner.weight_memory
        if self.engine.version >= 0:
            memory = self._shadow = weight_memory(runner.config, runner.group.shard, config.dtype, config.device)
        else:
            memory.regain()
        self._arrival = Arrival(runner.config, runner.group.shard, config.dtype, memory.tensors)
        if self._kind == "factors":
            self._beside = {
                n: torch.empty(shape, dtype=self._cargo.dtype, device=config.device) for n, shape in shapes.items()
            }

    def follow(self, ticket: Ticket) -> None:
        """Opens what another rank of this place passes on."""
        self._divide(ticket.open(self.place))

    def _divide(self, halves: Sequence[torch.Tensor]) -> None:
        """Gives each rank on another host its part of the halves of a mirror."""
        ends = accumulate(self._sizes(), initial=0)
        for w, (start, stop) in enumerate(pairwise(ends)):
            if start < stop:
                self._halves[w] = [half[start:stop] for half in halves]

    def _sizes(self) -> list[int]:
        """Bytes of each rank's part of a mirror's half: the most of any bucket, a multiple of 16; 0 of a rank of this host."""
        dtype = self._cargo.dtype
        spans = [[extent(bucket, dtype) for bucket in plan] for plan in self._plans]
        most = [max((span.stop - span.start for span in of_rank), default=0) for of_rank in spans]
        far = (place.host != self.place.host for place in self._places)
        return [-(-size // 16) * 16 if there else 0 for size, there in zip(most, far, strict=True)]

    @torch.no_grad()
    def take(self, number: int) -> None:
        """Copies this shard's part of bucket `number` of every trainer rank; what another rank passes on through memory is of
        the bucket before, which that one has then received."""
        if self._mirror:
            self._mirror.hide()
        passing: list[torch.distributed.Work] = []
        for w, (by, plan) in enumerate(zip(self._ways, self._plans, strict=True)):
            at = number - 1 if by.shared and by.relay else number
            if not 0 <= at < len(plan) or not plan[at]:
                continue
            there = extent(plan[at], self._cargo.dtype)
            bucket, start = self._bytes(w, at, there)
            if not by.shared:
                ends = f"{by.relay.name} {self.name}" if by.relay else f"{self.name} {w}"
                self._wire(ends, sender=False).receive(bucket)
            self._copy(plan[at], bucket, start)
            if self._places[w].host != self.place.host and not by.relay:
                passing += [self._wire(f"{self.name} {to}", sender=True).send(bucket) for to in self._wired]
        for work in passing:
            work.wait()
        self._wait()

    def _bytes(self, w: int, number: int, there: slice) -> tuple[torch.Tensor, int]:
        """Returns where bytes `there` of bucket `number` of rank w stand or will, and which byte of the bucket comes first."""
        halves = self._halves.get(w)
        if halves and self._ways[w] == Way(None, True):
            return halves[number % 2], 0
        size = there.stop - there.start
        if halves:
            return halves[number % 2][:size], there.start
        return torch.empty(size, dtype=torch.uint8, device=self.engine.config.device), there.start

    def _wire(self, ends: str, sender: bool) -> Wire:
        if ends not in self._wires:
            self._wires[ends] = Wire(f"{self._publication} {ends}", self.store, sender, self.place)
        return self._wires[ends]

    def _copy(self, pieces: Bucket, bucket: torch.Tensor, start: int) -> None:
        for piece in pieces:
            rows = piece.of(bucket, self._cargo.dtype, piece.start - start)
            if self._kind == "weights":
                assert self._arrival is not None
                self._arrival.take(piece, rows)
                continue
            target = self._beside[piece.parameter.name]
            target.view(len(target), -1)[piece.target : piece.target + piece.rows].copy_(rows)

    def _wait(self) -> None:
        if self.engine.config.device != "cuda":
            return
        if all(by.shared for by in self._ways):
            torch.cuda.current_stream().synchronize()
            return
        try:
            wait_for_wires()
        except TimeoutError:
            self.abandon()
            raise

    def keep(self) -> None:
        """Ends a publication of the frozen weights, which stay here."""
        self._close()

    @torch.no_grad()
    def received(self) -> list[int]:
        """Returns the fingerprint of this shard's part of every parameter, in order, as it was published; A and B are merged
        first."""
        self._halves, self._mirror = {}, None
        assert self._arrival is not None
        if self._kind == "factors":
            for p in served(self._model):
                merged = self._arrival.open(p)
                merge_part(self._model, self.engine.runner.group.shard, p, merged, self._frozen, self._beside)
                self._arrival.close(p)
        return self._arrival.fingerprints()

    def served(self) -> list[int]:
        """Returns the same of the tensors from which the engine samples, at any time: each below 2^64."""
        runner = self.engine.runner
        return fingerprints(runner.config, runner.group.shard, runner.weights, self._before)

    def commit(self, version: int, in_flight: InFlight = "refuse") -> None:
        """Makes the engine serve the new weights from here on; `in_flight`: what becomes of its requests."""
        self.engine.pause(f"weights of version {version} arrived", in_flight)
        if self._shadow:
            for name, tensor in self._shadow.tensors.items():
                self.engine.runner.weight_memory.tensors[name].copy_(tensor)
        assert self._arrival is not None
        self._before = self._arrival.before
        self.engine.version = version
        self._close()

    def withdraw(self) -> None:
        """Leaves the engine without weights from here on: those it holds are not what was published."""
        self.engine.version = -1

    def abandon(self) -> None:
        """Forgets a publication that failed, on any rank. The engine serves what it served before."""
        for wire in self._wires.values():
            wire.cut()
        self._wires = {}
        self._close()

    def _close(self) -> None:
        self._shadow, self._mirror, self._halves, self._under_way = None, None, {}, False
        self._arrival, self._beside = None, {}
