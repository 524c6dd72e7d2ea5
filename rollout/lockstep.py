"""One engine over the processes of its tensor-parallel ranks, kept in step by what it is told.

The schedule is a pure function of the requests and of the steps between which they arrive. So rank 0 sends every other rank,
before each step, the requests and the aborts that precede it (JSON over a pipe, no pickle; an empty message where there are
none), and nothing more. An idle rank sleeps in the read of its pipe, for as long as it takes; a closed pipe ends it.
"""

import contextlib
import json
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from kernels.collectives import TreeGroup, backend_of, peer_memory
from kernels.host.failures import shortage
from kernels.scratch import scratch
from rollout.engine import Engine, EngineConfig, freeze_heap
from rollout.replies import STEPS, Replies
from rollout.runner import RunnerError
from rollout.sampling import Completion, Request, SamplingParams
from rollout.source import Source

START = "forkserver" if sys.platform == "linux" else "spawn"
PATIENCE = timedelta(seconds=120)  # for another rank in the middle of a step, never for an idle one
_HERE, _READY = b"here", b"ready"

Progress = Callable[[int, int], None]
"""(tensors loaded, of how many)."""


class RankError(RuntimeError):
    """Says that another rank's process could not start, or ended."""


Memory = Literal["release pages", "release all", "resume"]
"""`Engine.sleep` at level 1 or 2, which ends what is in flight, and `Engine.wake`, which reads released weights again."""


@dataclass(frozen=True)
class News:
    """Holds what happened since the last step: the same on every rank."""

    requests: Sequence[Request] = ()
    aborts: Sequence[int] = ()
    forget: bool = False  # the prefix cache
    memory: Sequence[Memory] = ()

    def __bool__(self) -> bool:
        return bool(self.requests or self.aborts or self.forget or self.memory)

    def encode(self) -> bytes:
        """Encodes the news as JSON; nothing new is no bytes."""
        if not self:
            return b""
        parts = {"abort": self.aborts, "forget": self.forget, "memory": self.memory}
        return json.dumps({"add": [asdict(r) for r in self.requests], **parts}).encode()

    @classmethod
    def decode(cls, message: bytes) -> "News":
        """Decodes what `encode` made."""
        if not message:
            return cls()
        parts = json.loads(message)
        return cls([_request(fields) for fields in parts["add"]], parts["abort"], parts["forget"], parts["memory"])


def _request(fields: dict) -> Request:
    sampling: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["sampling"].items()}
    rest = fields["score_from"], fields["top"]
    return Request(fields["id"], tuple(fields["prompt_ids"]), SamplingParams(**sampling), *rest)


class Lockstep:
    """Runs rank 0 and its peers. A context manager: on the way out the peers have ended."""

    def __init__(
        self, source: Source, config: EngineConfig, size: int, threads: int, progress: Progress = lambda i, n: None
    ) -> None:
        source.config.check_shards(size, "tp", "leaves")
        self.source = source
        self.pipes: list[Connection] = []
        self.peers: list[multiprocessing.process.BaseProcess] = []
        self.held = contextlib.ExitStack()
        folder = str(self.held.enter_context(scratch()))
        context: Any = multiprocessing.get_context(START)
        plain = replace(source)  # without what was derived from it here
        try:
            for rank in range(1, size):
                here, there = context.Pipe()
                peer = context.Process(
                    target=_follow, args=(there, rank, size, folder, plain, config, threads), daemon=True
                )
                peer.start()
                there.close()
                self.pipes.append(here)
                self.peers.append(peer)
            self._await(_HERE)  # the rendezvous waits for a rank that ended, and hears no signal meanwhile
            self.engine = _engine(0, size, folder, source, config, threads, progress)
            self._await(_READY)
        except BaseException:
            self.close(patience=0)
            raise

    def _await(self, word: bytes) -> None:
        """Until every peer has said it."""
        for rank, pipe in enumerate(self.pipes, 1):
            try:
                if (answer := pipe.recv_bytes()) != word:
                    raise RankError(f"rank {rank} could not start: {answer.decode()}")
            except (EOFError, OSError):
                raise RankError(f"rank {rank} ended while it started") from None

    def __enter__(self) -> "Lockstep":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def turn(self, news: News) -> list[Completion]:
        """Does on every rank: the news, then one batch. RunnerError as of Engine.step; RankError where a peer is gone."""
        message = news.encode()
        for rank, pipe in enumerate(self.pipes, 1):
            try:
                pipe.send_bytes(message)
            except OSError:
                raise RankError(f"rank {rank} has ended") from None
        try:
            return _turn(self.engine, self.source, news)
        except RunnerError:
            raise
        except RuntimeError as error:  # a collective whose other end is gone
            if not self.pipes or shortage(error):
                raise
            raise RankError(f"a rank has ended or hangs: {' '.join(str(error).split())[:200]}") from None

    def generate(self, requests: Sequence[Request], replies: Replies | None = None) -> list[Completion]:
        """Serves all of them to the end; the samples of each side by side. With `replies` also what follows them, of which
        only the replies hear."""
        if replies:
            self._converse(requests, replies)
            return []
        for request in requests:
            self.engine.check(request)
        done = self.turn(News(requests))
        while not self.engine.idle:
            done += self.turn(News())
        found = {(c.request_id, c.sample): c for c in done}
        return [found[r.id, sample] for r in requests for sample in range(r.sampling.n)]

    def _converse(self, requests: Sequence[Request], replies: Replies) -> None:
        """Serves requests as they come, until none is left and none will come."""
        news = [*requests, *replies.requests(idle=not requests)]
        while news or not self.engine.idle:
            for request in news:
                self.engine.check(request)
            done = self.turn(News(news))
            for _ in range(STEPS - 1):
                if self.engine.idle:
                    break
                done += self.turn(News())
            replies.take(done)
            news = replies.requests(idle=self.engine.idle)

    def close(self, patience: float = 5) -> None:
        """Ends the peers. `patience`: seconds for a peer to end by itself."""
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.close()
        for peer in self.peers:
            peer.join(patience)
            if peer.is_alive():
                peer.kill()
                peer.join()
        if self.peers and dist.is_initialized():
            dist.destroy_process_group()
        self.pipes, self.peers = [], []
        self.held.close()


def _turn(engine: Engine, source: Source, news: News) -> list[Completion]:
    for request in news.requests:
        engine.add(request)
    done = [c for request_id in news.aborts for c in engine.abort(request_id)]
    if news.forget:
        engine.forget()
    for order in news.memory:
        if order == "resume":
            engine.wake()
            if engine.version < 0:
                engine.load(source.weights(), 0)
        else:
            engine.sleep(1 if order == "release pages" else 2, in_flight="abort")
    return done if engine.idle else done + engine.step()


def _engine(
    rank: int, size: int, folder: str, source: Source, config: EngineConfig, threads: int, progress: Progress
) -> Engine:
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor")  # torch 2.13 renames it
    torch.set_num_threads(threads)
    if config.device == "cuda":  # ranks share the devices there are
        torch.cuda.set_device(rank % torch.cuda.device_count())
    group = TreeGroup()
    if size > 1:
        store = dist.FileStore(str(Path(folder, "rendezvous")), size)
        backend = backend_of(config.device, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        assert dist.group.WORLD is not None
        group = TreeGroup(dist.group.WORLD, peer_memory(dist.group.WORLD) if backend == "nccl" else None)
    engine = Engine(source.config, config, group, source.decode)

    def told():  # type: ignore[no-untyped-def]
        for i, item in enumerate(source.weights(), 1):
            yield item
            progress(i, source.tensors)

    engine.load(told(), 0)
    return engine


def _follow(
    pipe: Connection, rank: int, size: int, folder: str, source: Source, config: EngineConfig, threads: int
) -> None:
    """The life of a peer."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # of the whole group; rank 0 decides, and closes the pipe
        signal.signal(number, signal.SIG_IGN)
    try:
        pipe.send_bytes(_HERE)
        engine = _engine(rank, size, folder, source, config, threads, lambda i, n: None)
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send_bytes(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".encode())
        return
    freeze_heap()
    pipe.send_bytes(_READY)
    with contextlib.suppress(EOFError, OSError):
        while True:
            message = pipe.recv_bytes()
            with contextlib.suppress(RunnerError, torch.OutOfMemoryError):  # rank 0 reports it
                _turn(engine, source, News.decode(message))
