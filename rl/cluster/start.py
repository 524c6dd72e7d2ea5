"""Starts the processes of a run: where they meet, which card each has, and what they are told."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
import torch
from torch.distributed import TCPStore

from kernels.collectives.rendezvous import address_of, listen
from kernels.model import ModelConfig
from rl.adapters import base_of, first_model
from rl.cluster.calls import Rank, gather
from rl.cluster.fleets import RolloutFleet, TrainerFleet
from rl.cluster.ray_processes import RayLost, session
from rl.config import RunConfig
from rl.errors import UserError
from rl.placement import Placement, place
from rollout.actor import RolloutRank
from trainer.actor import TrainerRank
from trainer.checkpoint import Checkpoint
from trainer.optimizer import AdamWConfig
from trainer.trainer import TrainerConfig


@contextlib.contextmanager
def cluster(
    config: RunConfig, model: ModelConfig, checkpoint: Checkpoint | None = None
) -> Iterator[tuple[RolloutFleet, TrainerFleet]]:
    """Starts all processes, and Ray if there is none yet; the trainer begins with `checkpoint`, or with the model that the
    config names. On the way out, however that is, ends what it started."""
    placement = place(config, torch.cuda.device_count() if config.device == "cuda" else 0)
    stores = rendezvous(config.cluster.port, config.rollout.replicas + 1)
    processes = len(placement.trainer) + len(placement.rollout)
    log = Path(config.out_dir) / "train.log"
    with contextlib.nullcontext() if ray.is_initialized() else session(config.cluster, processes, log):
        begun = first_model(config, model, checkpoint)
        ranks = _trainer_ranks(config, begun, placement, address_of(stores[0]), checkpoint)
        trains_only = config.mode == "train_only"
        engines = [] if trains_only else rollout_ranks(config, model, placement, stores)
        patience = config.cluster.patience
        places = () if trains_only else placement.rollout
        rollout, trainer = RolloutFleet(engines, model, places, patience), TrainerFleet(ranks, patience)
        try:
            start([*ranks, *(rank for engine in engines for rank in engine)], config.cluster.timeout, patience)
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


def start(ranks: Sequence[Rank], timeout: float, patience: float | None = None) -> None:
    """Waits until all of them are ready. RunError with what failed, or after `timeout` seconds."""
    begun = gather({rank.actor.start.remote(): rank for rank in ranks}, timeout, patience)
    for rank, pid in zip(ranks, begun, strict=True):
        rank.begun(pid)


def rollout_ranks(
    config: RunConfig, model: ModelConfig, placement: Placement, stores: Sequence[TCPStore]
) -> list[list[Rank]]:
    """Starts the engines' processes, which begin asleep where they are colocated. `stores`: the trainer's rendezvous, then
    one of each engine."""
    section = config.rollout
    engine = section.engine(config.dtype, config.device, config.kernels.family)
    actor = ray.remote(num_cpus=0, max_restarts=0)(RolloutRank)
    trainer, *addresses = [address_of(store) for store in stores]
    asleep = config.cluster.placement == "colocated"
    engines = []
    for i, address in enumerate(addresses):
        places = placement.rollout[i * section.tp : (i + 1) * section.tp]
        what = (section.tp, address, section.threads, model, engine)
        names = [f"rollout engine {i} rank {r}" for r in range(section.tp)]
        engines.append(
            [
                Rank(name, actor.remote(r, *what, where, name, trainer, asleep))
                for r, (name, where) in enumerate(zip(names, places, strict=True))
            ]
        )
    return engines


def _trainer_ranks(
    config: RunConfig, model: ModelConfig, placement: Placement, address: str, checkpoint: Checkpoint | None
) -> list[Rank]:
    section, training = config.trainer, training_of(config)
    actor = ray.remote(num_cpus=0, max_restarts=0)(TrainerRank)
    source = checkpoint or config.model.path or config.seed
    what = (section.world_size, address, section.threads, model, training, source, config.device)
    base = base_of(config, checkpoint)
    return [Rank(f"trainer rank {r}", actor.remote(r, *what, where, base)) for r, where in enumerate(placement.trainer)]


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
        config.seed,
        config.kernels.family,
    )


def rendezvous(first: int, count: int) -> list[TCPStore]:
    """Stores where `count` groups meet, for as long as they are kept: at the ports from `first` on, or at any free ones."""
    stores = []
    for port in range(first, first + count) if first else [0] * count:
        try:
            stores.append(listen(port))
        except OSError as error:
            raise UserError(
                f"cluster.port={first}: port {port} is in use ({error.strerror}); set another or 0"
            ) from None
    return stores
