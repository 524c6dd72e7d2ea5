"""The Ray actor of one rollout rank: a process, its rendezvous, and an engine."""

from collections.abc import Sequence
from typing import Literal

import torch

from kernels.collectives import TreeGroup, peer_memory
from kernels.collectives.bucket import Ticket
from kernels.collectives.rendezvous import join
from kernels.model import ModelConfig
from rollout.engine import Engine, EngineConfig, freeze_heap
from rollout.receiver import Receiver
from rollout.sampling import Completion, Request


class RolloutRank:
    """Rank `rank` of one tensor-parallel engine. The driver calls every rank of an engine with the same arguments."""

    def __init__(
        self,
        rank: int,
        size: int,
        store: str,
        threads: int,
        model: ModelConfig,
        config: EngineConfig,
        card: int,
        name: str,
        trainer: str,
        asleep: bool,
    ) -> None:
        """`card`: the GPU to use. `name`: of this rank, among all. `store`, `trainer`: the rendezvous of the engine and of the
        trainer. `asleep`: others begin with the card's memory."""
        torch.set_num_threads(threads)
        if config.device == "cuda":
            torch.cuda.set_device(card)
        group = TreeGroup()
        if size > 1:
            ranks = join(store, config.device, rank, size)
            group = TreeGroup(ranks, peer_memory(ranks))
        self.engine = Engine(model, config, group)
        if asleep:
            self.engine.sleep(2)
        self.receiver = Receiver(self.engine, name, trainer)
        freeze_heap()

    def begin_publication(self, name: str, tickets: Sequence[Ticket], half: int) -> None:
        self.receiver.begin(name, tickets, half)

    def take(self, number: int) -> None:
        self.receiver.take(number)

    def received(self) -> list[int]:
        return self.receiver.received()

    def commit(self, version: int) -> None:
        self.receiver.commit(version)

    def served(self) -> list[int]:
        return self.receiver.served()

    def withdraw(self) -> None:
        self.receiver.withdraw()

    def abandon(self) -> None:
        self.receiver.abandon()

    def sleep(self, level: Literal[1, 2]) -> None:
        self.engine.sleep(level)

    def wake(self) -> None:
        self.engine.wake()

    def peak_bytes(self) -> int:
        return self.engine.peak_bytes()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return self.engine.generate(requests)
