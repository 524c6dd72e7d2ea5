"""The Ray actor of one rollout rank: a process, its rendezvous, and an engine."""

import os
from collections.abc import Sequence
from typing import Literal

import torch

from kernels.collectives import TreeGroup, peer_memory
from kernels.collectives.heartbeat import Heartbeat
from kernels.collectives.rendezvous import choose_network, join
from kernels.host.failures import with_typed_failures
from kernels.host.place import Place
from kernels.model import ModelConfig
from kernels.weights.bucket import Ticket, remove_leftovers
from kernels.weights.cargo import Kind
from kernels.weights.routes import Recipient
from rollout.drafts.speculation import Counts
from rollout.engine import Engine, EngineConfig, freeze_heap
from rollout.receiver import Receiver
from rollout.sampling import Completion, Request


@with_typed_failures
class RolloutRank:
    """Runs rank `rank` of one tensor-parallel engine. The driver calls every rank of an engine with the same arguments."""

    def __init__(
        self,
        rank: int,
        places: Sequence[Place],
        store: str,
        threads: int,
        model: ModelConfig,
        config: EngineConfig,
        name: str,
        trainer: str,
        asleep: bool,
        interface: str | None = None,
        patience: float | None = None,
    ) -> None:
        """Only remembers; `start` does the work, so that what goes wrong there is told as of any other method. `places`
        of the engine's ranks. `name`: of this rank, among all. `store`, `trainer`: the rendezvous of the engine and of the
        trainer. `asleep`: others begin with the card's memory. `interface`: of the network to talk over,
        `patience`: seconds in a collective (both as of `join`)."""
        self.rank, self.places, self.size, self.stores = rank, places, len(places), (store, trainer)
        self.model, self.config, self.threads, self.name, self.asleep = model, config, threads, name, asleep
        self.interface, self.patience = interface, patience

    def start(self) -> int:
        """Meets the other ranks of the engine, and builds it; returns the id of this process. A collective."""
        torch.set_num_threads(self.threads)
        self.places[self.rank].enter()
        Heartbeat(self.name, self.stores[1])
        group, (store, trainer) = TreeGroup(), self.stores
        if self.size > 1:
            cards, how = len(set(self.places)), (self.interface, self.patience)
            ranks = join(store, self.config.device, self.rank, self.size, cards, *how)
            group = TreeGroup(ranks, peer_memory(ranks))
        self.engine = Engine(self.model, self.config, group)
        if self.asleep:
            self.engine.sleep(2)
        choose_network(trainer, self.interface)  # of the publication's wires, also where the engine is of one rank
        self.receiver = Receiver(self.engine, self.name, trainer, self.places[self.rank])
        remove_leftovers()  # of a run that was killed, on this host
        freeze_heap()
        return os.getpid()

    def begin_publication(
        self,
        name: str,
        tickets: Sequence[Ticket],
        company: Sequence[Recipient],
        half: int,
        kind: Kind = "weights",
        model: ModelConfig | None = None,
    ) -> Ticket | None:
        """Begins a publication: opens the buckets of the trainer ranks of its place, as `Receiver.begin`."""
        return self.receiver.begin(name, tickets, company, half, kind, model)

    def follow(self, ticket: Ticket) -> None:
        """Opens what another rank of its place passes on."""
        self.receiver.follow(ticket)

    def take(self, number: int) -> None:
        """Copies this shard's part of bucket `number` out of it."""
        self.receiver.take(number)

    def keep(self) -> None:
        """Ends a publication of frozen weights."""
        self.receiver.keep()

    def received(self) -> list[int]:
        """Returns the fingerprint of this shard's part of every parameter as it arrived."""
        return self.receiver.received()

    def commit(self, version: int) -> None:
        """Serves the new weights from here on, as `version`."""
        self.receiver.commit(version)

    def served(self) -> list[int]:
        """Returns the fingerprint of this shard's part of every parameter as it is served."""
        return self.receiver.served()

    def withdraw(self) -> None:
        """Takes the weights out of service."""
        self.receiver.withdraw()

    def abandon(self) -> None:
        """Forgets a publication that failed."""
        self.receiver.abandon()

    def sleep(self, level: Literal[1, 2]) -> None:
        """Releases the memory of the keys and values (1), or of the weights too (2), which are lost."""
        self.engine.sleep(level)

    def wake(self) -> None:
        """Regains the memory that `sleep` released."""
        self.engine.wake()

    def peak_bytes(self) -> int:
        """Returns the most bytes that this rank held so far."""
        return self.engine.peak_bytes()

    def drafts(self) -> Counts:
        """Returns what became of drafted tokens so far."""
        return self.engine.drafts

    def advance(self, requests: Sequence[Request], steps: int) -> list[Completion]:
        """Queues requests and does up to `steps` steps; returns what ended."""
        return self.engine.advance(requests, steps)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Serves all requests to their end; this rank runs in step with the others of its engine."""
        return self.engine.generate(requests)
