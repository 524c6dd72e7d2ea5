"""Starts the processes of a run: where they meet, which card each has, and what they are told."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from torch.distributed import TCPStore

from kernels.collectives.heartbeat import Heard
from kernels.collectives.rendezvous import LOOPBACK, address_of, listen
from kernels.host.place import HOST, Place
from kernels.model import ModelConfig
from rl.adapters import base_of, first_model
from rl.cluster.calls import gather
from rl.cluster.fleets import RolloutFleet, TrainerFleet
from rl.cluster.nodes import Reserved, own_address, reserved
from rl.cluster.ray_processes import RayLost, session
from rl.cluster.shelves import opened, supplied
from rl.cluster.watch import Nodes, Pulse, Rank
from rl.config import RunConfig
from rl.errors import UserError
from rollout.actor import RolloutRank
from trainer.checkpoint import Checkpoint
from trainer.config import AdamWConfig, TrainerConfig


@contextlib.contextmanager
def cluster(
    config: RunConfig, model: ModelConfig, checkpoint: Checkpoint | None = None
) -> Iterator[tuple[RolloutFleet, TrainerFleet]]:
    """Starts all processes, and Ray if there is none yet; the trainer begins with `checkpoint`, or with the model that the
    config names. On the way out, however that is, ends what it started."""
    section = config.cluster
    stores = open_stores(config) if section.address == "local" else []  # a port in use is told before Ray starts
    processes = config.trainer.world_size + config.rollout.replicas * config.rollout.tp
    log = Path(config.out_dir) / "train.log"
    connected = contextlib.nullcontext() if ray.is_initialized() else session(section, processes, log, _rank_class)
    with connected, reserved(config) as where:
        stores = stores or open_stores(config)
        folder = Path(config.out_dir).absolute()
        shelves = opened(folder, section.timeout) if section.address != "local" and folder.is_dir() else None
        if checkpoint:
            checkpoint = supplied(checkpoint, shelves, where.placement.trainer, config.trainer.replicas)
        begun = first_model(config, model, checkpoint)
        ranks = _trainer_ranks(config, begun, where, address_of(stores[0]), checkpoint)
        trains_only = config.mode == "train_only"
        engines = [] if trains_only else rollout_ranks(config, model, where, stores)
        patience, placement = section.patience, where.placement
        rollout = RolloutFleet(engines, model, () if trains_only else placement.rollout, patience)
        trainer = TrainerFleet(ranks, placement.trainer, patience, config.trainer.replicas)
        trainer.model, trainer.dtype, trainer.sends = begun, config.dtype, config.adapter.publish
        trainer.shelves = shelves
        try:
            every = [*ranks, *(rank for engine in engines for rank in engine)]
            listen_to(every, stores[0], where)
            start(every, section.timeout, patience)
            yield rollout, trainer
        except RayLost:  # which cannot be told to end anything; the session does
            raise
        except BaseException:
            _end(rollout, trainer)
            raise
        _end(rollout, trainer)


def _end(rollout: RolloutFleet, trainer: TrainerFleet) -> None:
    rollout.kill()
    trainer.kill()
    if trainer.shelves:
        trainer.shelves.close()


def start(ranks: Sequence[Rank], timeout: float, patience: float | None = None) -> None:
    """Waits until all of them are ready. RunError with what failed, or after `timeout` seconds."""
    begun = gather({rank.actor.start.remote(): rank for rank in ranks}, timeout, patience)
    for rank, pid in zip(ranks, begun, strict=True):
        rank.begun(pid)


def rollout_ranks(
    config: RunConfig, model: ModelConfig, where: Reserved, stores: Sequence[TCPStore]
) -> list[list[Rank]]:
    """Starts the engines' processes, which begin asleep where they are colocated. `stores`: the trainer's rendezvous, then
    one of each engine."""
    section = config.rollout
    engine = section.engine(config.dtype, config.device, config.kernels.family)
    actor = ray.remote(num_cpus=0, max_restarts=0)(RolloutRank)
    trainer, *addresses = [address_of(store) for store in stores]
    asleep = config.cluster.placement == "colocated"
    network = config.cluster.interface, config.cluster.collective_seconds
    engines = []
    for i, address in enumerate(addresses):
        places = where.placement.rollout[i * section.tp : (i + 1) * section.tp]
        what = (places, address, section.threads, model, engine)
        names = [named(f"rollout engine {i} rank {r}", p) for r, p in enumerate(places)]
        engines.append(
            [
                Rank(
                    name,
                    actor.options(**where.options(p.host)).remote(r, *what, name, trainer, asleep, *network),
                    host=where.elsewhere(p.host),
                )
                for r, (name, p) in enumerate(zip(names, places, strict=True))
            ]
        )
    return engines


def _rank_class() -> type:
    """Imports the class of a trainer rank, and with it FSDP2: a second or two in which Ray can start."""
    from trainer.actor import TrainerRank

    return TrainerRank


def _trainer_ranks(
    config: RunConfig, model: ModelConfig, where: Reserved, address: str, checkpoint: Checkpoint | None
) -> list[Rank]:
    section, training = config.trainer, training_of(config)
    actor: Any = ray.remote(num_cpus=0, max_restarts=0)(_rank_class())
    path = config.model.path and str(Path(config.model.path).absolute())
    source = checkpoint or path or config.seed
    base, places = base_of(config, checkpoint), where.placement.trainer
    what = (places, address, section.threads, model, training, source, config.device)
    names, network = [named(f"trainer rank {r}", p) for r, p in enumerate(places)], config.cluster.interface
    return [
        Rank(
            name,
            actor.options(**where.options(p.host)).remote(
                r, *what, name, network, base, config.cluster.collective_seconds
            ),
            host=where.elsewhere(p.host),
        )
        for r, (name, p) in enumerate(zip(names, places, strict=True))
    ]


def listen_to(ranks: Sequence[Rank], store: TCPStore, where: Reserved) -> None:
    """Lets whoever waits for the ranks hear their signs of life, which come to the trainer's store."""
    pulse = Pulse(Heard(store, [rank.name for rank in ranks]), Nodes(where.raylets, partial(_kill, where)))
    for rank in ranks:
        rank.pulse = pulse


def _kill(where: Reserved, rank: Rank) -> None:
    """Ends the process of a rank that does not answer, on its node."""

    def end(pid: int) -> None:
        import os

        os.kill(pid, 9)

    if rank.process is not None:
        rank.process.kill()
    elif rank.host is not None and rank.pid:
        there = ray.remote(num_cpus=0, max_retries=0)(end).options(**where.options(rank.host)).remote(rank.pid)
        ray.wait([there], timeout=5)


def named(rank: str, place: Place) -> str:
    """Returns the name of a rank, with the address of its node where there may be several."""
    return rank if place.host == HOST else f"{rank} ({place.host})"


def training_of(config: RunConfig, prefix: str = "") -> TrainerConfig:
    """Returns a trainer's settings; `prefix` of its tensors in a checkpoint."""
    section = config.trainer
    return TrainerConfig(
        section.leaf_sequences,
        section.micro_leaves,
        AdamWConfig(
            section.betas, section.eps, section.weight_decay, section.grad_clip, getattr(torch, section.moments)
        ),
        config.dtype,
        section.micro_tokens,
        section.offload,
        section.checkpointing,
        prefix,
        section.router_aux_loss_coef,
        section.replicas,
        config.seed,
        config.adapter.path and str(Path(config.adapter.path).absolute()),
        config.kernels.family,
    )


def open_stores(config: RunConfig) -> list[TCPStore]:
    """Opens the stores where the trainer and each engine meet: on this host alone, or for the nodes of a cluster."""
    section, count = config.cluster, config.rollout.replicas + 1
    if section.address == "local":
        return rendezvous(section.port, count)
    return rendezvous(section.port, count, own_address(section.interface))


def rendezvous(first: int, count: int, host: str = LOOPBACK) -> list[TCPStore]:
    """Opens stores where `count` groups meet, for as long as they are kept: at address `host`, at the ports from `first` on, or
    at any free ones."""
    stores = []
    for port in range(first, first + count) if first else [0] * count:
        try:
            stores.append(listen(port, host))
        except OSError as error:
            raise UserError(
                f"cluster.port={first}: port {port} is in use ({error.strerror}); set another or 0"
            ) from None
    return stores
