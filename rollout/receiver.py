"""The rollout's side of a publication: a shard's part of every bucket, checked before it is served."""

from collections.abc import Mapping, Sequence

import torch

from kernels.host.place import Place
from kernels.model import served
from kernels.weights.bucket import Ticket, Wire, wait_for_wires
from kernels.weights.fingerprint import fingerprint, unsigned
from kernels.weights.reshard import Bucket, buckets, extent, shard_rows
from rollout.engine import Engine, InFlight
from rollout.memory import Reclaimable


class Receiver:
    """Receives publications on one rank of an engine. One publication at a time: `begin`, `take` of every bucket, `received`,
    then `commit` or `abandon`.

    Atomic: an engine that has weights goes on with them until `commit`; the new ones gather in a second set of the shard's
    size, which is there for the publication only. An engine without weights (not loaded yet, or asleep at level 2) has nothing
    to keep, and takes the new ones where they will be.
    """

    def __init__(self, engine: Engine, name: str, store: str) -> None:
        """`name`: of this rank, among all. `store`: of the trainer's TCPStore, tcp://host:port."""
        self.engine, self.name, self.store = engine, name, store
        self._wires: dict[int, Wire] = {}
        self._shadow: Reclaimable | None = None
        self._halves: list[list[torch.Tensor]] = []
        self._under_way = False

    def begin(self, name: str, tickets: Sequence[Ticket], half: int) -> None:
        """Begins a publication: `tickets` of all trainer ranks; `name` and `half` as on their side. torch.OutOfMemoryError
        where there is no room for the second set."""
        if self._under_way:
            self.abandon()
        self._publication = name
        runner, config = self.engine.runner, self.engine.config
        self._near = [ticket.place == Place.here(config.device) for ticket in tickets]
        self._halves = [ticket.open() if near else [] for ticket, near in zip(tickets, self._near, strict=True)]
        size = runner.group.shard.size
        self._plans: list[list[Bucket]] = [
            [
                [piece for piece in bucket if piece.shard == runner.group.shard]
                for bucket in buckets(runner.config, w, len(tickets), size, half, config.dtype)
            ]
            for w in range(len(tickets))
        ]
        self._target = runner.weights
        if self.engine.version >= 0:
            shapes = {name: tuple(tensor.shape) for name, tensor in runner.weights.items()}
            self._shadow = Reclaimable(shapes, config.dtype, config.device)
            self._target = self._shadow.tensors
        else:
            runner.weight_memory.regain()
        self._under_way = True

    @torch.no_grad()
    def take(self, number: int) -> None:
        """Copies this shard's part of bucket `number` of every trainer rank."""
        dtype = self.engine.config.dtype
        for w, plan in enumerate(self._plans):
            pieces = plan[number] if number < len(plan) else []
            if not pieces:
                continue
            if self._near[w]:
                bucket, start = self._halves[w][number % 2], 0
            else:
                there = extent(pieces, dtype)
                bucket, start = torch.empty(there.stop - there.start, dtype=torch.uint8, device="cuda"), there.start
                if w not in self._wires:
                    self._wires[w] = Wire(f"{self._publication} {self.name} {w}", self.store, sender=False)
                self._wires[w].receive(bucket)
            for piece in pieces:
                target = self._target[piece.parameter.name]
                rows = target.view(len(target), -1)[piece.target : piece.target + piece.rows]
                rows.copy_(piece.of(bucket, dtype, piece.start - start))
        if not all(self._near):
            try:
                wait_for_wires()
            except TimeoutError:
                self.abandon()
                raise
        elif self.engine.config.device == "cuda":
            torch.cuda.current_stream().synchronize()

    def received(self) -> list[int]:
        """Returns the fingerprint of this shard's part of every parameter, in order, as it now lies in memory."""
        self._halves = []
        return self._fingerprints(self._target)

    def served(self) -> list[int]:
        """Returns the same of the tensors from which the engine samples, at any time: each below 2^64."""
        return self._fingerprints(self.engine.runner.weights)

    def _fingerprints(self, weights: Mapping[str, torch.Tensor]) -> list[int]:
        runner, out = self.engine.runner, []
        for p in served(runner.config):
            held = weights[p.name]
            column = runner.group.shard.rank * held.shape[1] if p.axis == 1 else 0
            sums = [
                fingerprint(held[at : at + len(rows)], rows.start, column)
                for rows, at in shard_rows(p, runner.group.shard)
            ]
            out.append(torch.stack(sums).sum())
        return [unsigned(value) for value in torch.stack(out).tolist()]

    def commit(self, version: int, in_flight: InFlight = "refuse") -> None:
        """Makes the engine serve the new weights from here on; `in_flight`: what becomes of its requests."""
        self.engine.pause(f"weights of version {version} arrived", in_flight)
        if self._shadow:
            for name, tensor in self._shadow.tensors.items():
                self.engine.runner.weights[name].copy_(tensor)
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
        self._shadow, self._halves, self._target, self._under_way = None, [], {}, False
