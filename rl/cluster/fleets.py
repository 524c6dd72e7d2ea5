"""The processes of a run: Ray actors of the rollout engines and of the trainer, called as two groups."""

import contextlib
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayError, RayTaskError
from torch.distributed import TCPStore

from kernels.collectives.rendezvous import address_of, listen
from kernels.model import ModelConfig
from kernels.model.beside import Beside
from kernels.model.tensor_file import WrittenFile
from rl.config import ClusterSection, RunConfig
from rl.errors import BAD_INPUT, RunError, SaveError, UserError
from rl.family import TAG, end, family, guarded
from rl.memory import OutOfMemory, shortage_of
from rl.placement import Placement, place
from rollout.actor import RolloutRank
from rollout.engine import EngineConfig
from rollout.sampling import Completion, Request
from rollout.scheduler import Limits
from trainer.actor import TrainerRank
from trainer.batch import Batch, StepReport
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.loss import Clip, Objective
from trainer.optimizer import AdamWConfig
from trainer.publisher import Receiver
from trainer.trainer import TrainerConfig

_OBJECT_STORE = 256 * 2**20


class Ranks:
    """Actors that are called together."""

    def __init__(self, name: str, actors: Sequence[Any]) -> None:
        self.name, self.actors = name, list(actors)

    def start(self, method: str, *args: Any) -> list[Any]:
        return [getattr(actor, method).remote(*args) for actor in self.actors]


def gather(pending: dict[Any, str], timeout: float | None = None) -> list[Any]:
    """The results of all calls, in order. The first failure ends the wait: the others would hang in a collective. Of the
    failures that arrive within a moment, a death or a Python error outranks the broken connections it causes."""
    waiting = list(pending)
    failures: list[tuple[str, RayError]] = []
    deadline = None if timeout is None else time.monotonic() + timeout
    while waiting:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if failures:  # broken connections alone: the death that broke them is on its way
            left = _MOMENT if any(_severity(error) < _BROKEN for _, error in failures) else _DEATH
        ready, waiting = ray.wait(waiting, timeout=left)
        if not ready and not failures:
            raise RunError(f"{pending[waiting[0]]} did not answer within {timeout:.0f} s")
        for reference in ready:
            try:
                ray.get(reference)
            except RayError as error:
                failures.append((pending[reference], error))
        if failures and not ready:
            break
    if failures:
        raise _root_cause(failures)
    return ray.get(list(pending))


_MOMENT, _DEATH = 0.5, 10.0  # seconds to wait for the other ranks' failures, and for the one that explains them
_BROKEN = 2  # the severity of a connection that another rank broke


def _settle(calls: dict[Any, str]) -> None:
    """Waits a moment for what can still answer."""
    ray.wait(list(calls), num_returns=len(calls), timeout=_DEATH)


def _severity(error: RayError) -> int:
    """0 for a process that died, 1 for an exception of its own, _BROKEN for what these do to the other ranks."""
    if isinstance(error, (ActorDiedError, RayActorError)):
        return 0
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "DistBackendError")
    return _BROKEN if isinstance(error, RayTaskError) and any(word in str(error.cause) for word in words) else 1


def _root_cause(failures: list[tuple[str, RayError]]) -> Exception:
    name, error = min(failures, key=lambda failure: _severity(failure[1]))
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, BAD_INPUT):
        return cause
    if isinstance(cause, CheckpointError):
        return SaveError(f"{name}: {cause}")
    if shortage := shortage_of(f"{type(cause).__name__}: {cause}"):
        return OutOfMemory(name, shortage)
    lines = str(cause).strip().splitlines()
    if (
        isinstance(cause, ActorDiedError) and "creation task" in lines[0]
    ):  # its own error is the last line of a traceback
        return RunError(f"{name} could not start: {lines[-1].strip()[:400]}")
    text = " ".join(" ".join(lines).split())[:400]
    return RunError(f"{name} failed: {type(cause).__name__}: {text}")


class RolloutFleet:
    """Engines that share a step's requests. Which one serves a request changes nothing in its completion."""

    def __init__(self, replicas: list[Ranks], model: ModelConfig, cards: Sequence[int]) -> None:
        """`cards` of all ranks, engine by engine."""
        self.replicas, self.model = replicas, model
        self.published: list[list[int]] | None = None
        """What they are to serve: the trainer's fingerprints, [parameter][shard]."""
        ranks = [(f"{e.name} rank {shard}", shard) for e in replicas for shard in range(len(e.actors))]
        self.receivers = [Receiver(name, shard, card) for (name, shard), card in zip(ranks, cards, strict=True)]

    def started(self, method: str, *args: Any) -> dict[Any, str]:
        """Calls that run on every rank, for `gather`."""
        calls = [call for engine in self.replicas for call in engine.start(method, *args)]
        return {call: receiver.name for call, receiver in zip(calls, self.receivers, strict=True)}

    def call(self, method: str, *args: Any) -> list[Any]:
        return gather(self.started(method, *args))

    def abandon(self) -> None:
        """Every engine that lives forgets a publication that failed."""
        _settle(self.started("abandon"))

    def sleep(self, level: Literal[1, 2]) -> None:
        """Gives back the memory of keys and values, at level 2 that of the weights too."""
        self.call("sleep", level)

    def wake(self) -> None:
        self.call("wake")

    def peak_bytes(self) -> int:
        """Most memory that the fullest rank had so far."""
        return max(self.call("peak_bytes"))

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All completions, in the order of the requests, the samples of each side by side. Requests of one prompt stay
        together, for the prefix cache."""
        count = len(self.replicas)
        prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt_ids for r in requests))}
        shares = [[r for r in requests if prompts[r.prompt_ids] % count == i] for i in range(count)]
        calls: dict[Any, str] = {}
        for engine, share in zip(self.replicas, shares, strict=True):
            if share:
                calls |= {ref: f"{engine.name} rank {i}" for i, ref in enumerate(engine.start("generate", share))}
        done = {(c.request_id, c.sample): c for part in gather(calls) for c in part}
        return [done[r.id, sample] for r in requests for sample in range(r.sampling.n)]


class TrainerFleet:
    """The FSDP2 ranks of the trainer."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def started(self, method: str, *args: Any) -> dict[Any, str]:
        """Calls that run on every rank, for `gather`."""
        return {ref: f"trainer rank {i}" for i, ref in enumerate(self.ranks.start(method, *args))}

    def call(self, method: str, *args: Any) -> list[Any]:
        return gather(self.started(method, *args))

    def step(self, batch: Batch, objective: Objective, lr: float) -> StepReport:
        return StepReport.merge(self.call("step", ray.put(batch), objective, lr))

    def cut(self) -> None:
        """Every rank that lives ends a publication that failed."""
        _settle(self.started("cut"))

    def reset_optimizer(self) -> None:
        self.call("reset_optimizer")

    def offload(self) -> None:
        """The cards' memory is free until `onload`: weights and moments wait on the host, and nothing else works."""
        self.call("offload")

    def onload(self) -> None:
        self.call("onload")

    def digest(self) -> str:
        """`kernels.model.weights.digest` of the weights as they are served."""
        return self.call("digest")[0]

    def snapshot(self, folder: Path) -> int:
        """Begins to write every rank's shard into `folder`; returns the optimizer's step count."""
        return self.call("snapshot", str(folder))[0]

    def written(self, wait: bool) -> list[WrittenFile] | None:
        """The files of the last snapshot once all are on the disk; None before, unless it is to `wait`."""
        files = self.call("written", wait)
        return None if None in files else files

    def save(self, directory: str, beside: Beside) -> str:
        """Writes the master weights and what stands beside them as a Hugging Face model directory, if one is named; returns the
        digest of the weights."""
        return self.call("save", directory, beside)[0]


@contextlib.contextmanager
def session(config: ClusterSection, processes: int) -> Iterator[None]:
    """Starts Ray; on the way out, however that is, ends all its processes."""
    tag = uuid.uuid4().hex
    with guarded(tag):
        try:
            _start_ray(config, processes, tag)
            yield
        finally:
            _end_ray(tag)


@contextlib.contextmanager
def cluster(
    config: RunConfig, model: ModelConfig, checkpoint: Checkpoint | None = None
) -> Iterator[tuple[RolloutFleet, TrainerFleet]]:
    """Starts all processes, and Ray if there is none yet; the trainer begins with `checkpoint`, or with the model that the
    config names. On the way out, however that is, ends what it started."""
    placement = place(config, torch.cuda.device_count() if config.device == "cuda" else 0)
    stores = rendezvous(config.cluster.port, config.rollout.replicas + 1)
    processes = len(placement.trainer) + len(placement.rollout)
    with contextlib.nullcontext() if ray.is_initialized() else session(config.cluster, processes):
        ranks = _trainer_ranks(config, model, placement, address_of(stores[0]), checkpoint)
        replicas = rollout_ranks(config, model, placement, stores)
        try:
            wait_for_start((ranks, *replicas), config.cluster.timeout)
            yield RolloutFleet(replicas, model, placement.rollout), TrainerFleet(ranks)
        finally:
            for actor in (a for g in (ranks, *replicas) for a in g.actors):
                ray.kill(actor)


def wait_for_start(groups: Sequence[Ranks], timeout: float) -> None:
    """RunError with what failed, or after `timeout` seconds."""
    started = {a.__ray_ready__.remote(): f"{g.name} rank {i}" for g in groups for i, a in enumerate(g.actors)}
    gather(started, timeout)


def rollout_ranks(
    config: RunConfig, model: ModelConfig, placement: Placement, stores: Sequence[TCPStore]
) -> list[Ranks]:
    """The engines' processes, which begin asleep where they are colocated. `stores`: the trainer's rendezvous, then one of
    each engine."""
    section = config.rollout
    engine = EngineConfig(
        pages=section.pages,
        page_size=section.page_size,
        prefix_cache=section.prefix_cache,
        limits=Limits(section.max_running, section.max_batch_tokens, section.prefill_chunk),
        dtype=config.dtype,
        device=config.device,
        cuda_graphs=config.device == "cuda",
        overlap=config.device == "cuda",
    )
    actor = ray.remote(num_cpus=0, max_restarts=0)(RolloutRank)
    replicas = []
    trainer, *engines = [address_of(store) for store in stores]
    for i, address in enumerate(engines):
        name, cards = f"rollout engine {i}", placement.rollout[i * section.tp : (i + 1) * section.tp]
        what, asleep = (section.tp, address, section.threads, model, engine), config.cluster.placement == "colocated"
        ranks = [actor.remote(r, *what, card, f"{name} rank {r}", trainer, asleep) for r, card in enumerate(cards)]
        replicas.append(Ranks(name, ranks))
    return replicas


def _trainer_ranks(
    config: RunConfig, model: ModelConfig, placement: Placement, address: str, checkpoint: Checkpoint | None
) -> Ranks:
    section = config.trainer
    training = TrainerConfig(
        section.leaf_sequences,
        section.micro_leaves,
        AdamWConfig(
            section.betas, section.eps, section.weight_decay, section.grad_clip, getattr(torch, section.moments)
        ),
        Clip(section.clip_low, section.clip_high),
        config.dtype,
        section.micro_tokens,
        section.offload,
        section.checkpointing,
    )
    actor = ray.remote(num_cpus=0, max_restarts=0)(TrainerRank)
    source = checkpoint or config.model.path or config.seed
    what = (section.world_size, address, section.threads, model, training, source, config.device)
    return Ranks("trainer", [actor.remote(r, *what, card) for r, card in enumerate(placement.trainer)])


def _start_ray(config: ClusterSection, processes: int, tag: str) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
    local: dict[str, Any] = {}
    if config.address == "local":
        local = {"num_cpus": max(processes, 1), "object_store_memory": _OBJECT_STORE, "include_dashboard": False}
    else:
        _check_address(config.address)
    handler = signal.getsignal(signal.SIGTERM)
    os.environ[TAG] = tag
    try:
        ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError, GetTimeoutError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"Ray did not start (cluster.address={config.address}): {reason}") from None
    finally:
        del os.environ[TAG]
        signal.signal(signal.SIGTERM, handler)  # ray.init sets its own


def _end_ray(tag: str) -> None:
    """Also ends what Ray leaves behind where it was interrupted while it started."""
    left = family(tag, set())
    ray.shutdown()
    end(tag, left, patience=3)


def _check_address(address: str) -> None:
    """Ray itself tries for minutes, and fills stderr."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not port.isdigit():
        return  # "auto"
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"cluster.address={address}: nothing answers there ({error}); 'local' starts Ray") from None


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
