"""`python -m rollout.serve [model=DIR] [tp=N] [key=value ...]`: an HTTP server of one model.

Without a model it serves a tiny one of random weights over bytes, so that anyone can try it at once. Exit code 0: told to end,
and all that ran was finished. 1: the engine failed. 2: a bad argument or model. A second signal ends it at once.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Annotated, Any

import torch

from kernels.cpu import BuildError
from kernels.device import UnsupportedError, choose_device
from kernels.host.command import Terminated, fail, report, terminable, warn
from kernels.host.failures import shortage
from kernels.host.memory import available_memory
from kernels.model import ConfigError, ModelConfig, costs
from kernels.model.ahead import Serving, prepare
from kernels.packages import version_of
from kernels.tree import TreeError
from kernels.weights.beside import name_of
from rollout.arguments import ArgumentError, parse
from rollout.capacity import ENGINE_PROCESS, tokens_that_fit
from rollout.engine import EngineConfig, freeze_heap
from rollout.keys import (
    Device,
    Dtype,
    Family,
    Format,
    Key,
    Leaves,
    MaxBatchTokens,
    MaxRunning,
    Open,
    Pages,
    PageSize,
    PrefillChunk,
    PrefixCache,
    Speculate,
    Threads,
    Tp,
    check,
    ranges,
)
from rollout.lockstep import Lockstep, RankError
from rollout.loop import EngineLoop
from rollout.sampling import RequestError
from rollout.scheduler import Limits
from rollout.source import Source

_HOST_SHARE = 0.8  # of the memory that is free, for a server on a CPU that is told no number of pages
_LAST_WORDS = 30.0  # seconds for a client to read the end of its answer
_PROCESS = 2**30  # of a process on a GPU, beside its tensors: the CUDA context, kernels, graphs
BAD_INPUT = (ArgumentError, ConfigError, RequestError, TreeError, BuildError, UnsupportedError)


@dataclass(frozen=True)
class ServeConfig:
    """Holds the server's arguments; nothing here but `model`, `adapter`, `leaves`, `dtype` and `format` changes a bit of an
    answer."""

    model: Annotated[str | None, Key(description="a Hugging Face model directory")] = None
    adapter: Annotated[
        str | None, Key(description="a folder of LoRA adapters of it (peft), merged into its weights")
    ] = None
    tp: Tp = 1
    leaves: Annotated[Leaves, Open("as the model's contract says, or 8")] = 0
    dtype: Annotated[Dtype, Key(description="auto: as the model's contract says, or the dtype of its tensors")] = "auto"
    format: Annotated[Format, Key(description="auto: as the model's files or contract say, or plain")] = "auto"
    device: Device = "auto"
    family: Family = "auto"
    threads: Annotated[Threads, Open("the cores divided by tp, 8 at most")] = 0
    host: str = "127.0.0.1"
    port: Annotated[int, Key(le=65535, description="0: any free one")] = 30000
    names: Annotated[
        str | None,
        Key(description='what clients may call it beside host and localhost, by commas; "*": anything'),
    ] = None
    api_key: Annotated[
        str | None, Key(description="or SAMEBIT_API_KEY in the environment, which other users' `ps` does not show")
    ] = None
    pages: Annotated[Pages, Open("what there is room for, on a CPU at most max_running texts of 2,048 tokens")] = 0
    gpu_memory_utilization: Annotated[
        float, Key(le=1, description="share of a GPU that weights, activations and pages may take")
    ] = 0.9
    page_size: PageSize = 16
    prefix_cache: PrefixCache = True
    max_running: Annotated[MaxRunning, Open("64 on a CPU, 256 on a GPU")] = 0
    max_batch_tokens: Annotated[MaxBatchTokens, Open("2,048 on a CPU, 8,192 on a GPU")] = 0
    prefill_chunk: Annotated[PrefillChunk, Open("a quarter of those on a CPU, all of them on a GPU")] = 0
    speculate: Speculate = "auto"
    max_queue: Annotated[int, Key(ge=1, description="samples in flight; one more is answered 429")] = 1024
    max_body: Annotated[int, Key(ge=1, description="bytes of a request's body")] = 16 * 2**20
    max_connections: Annotated[int, Key(ge=1, description="open at once")] = 2048
    header_seconds: Annotated[
        float, Key(ge=1, description="for the headers of a request, and between two of a connection")
    ] = 30.0
    body_seconds: Annotated[float, Key(ge=1, description="for a body to arrive")] = 60.0
    request_seconds: Annotated[float, Key(description="then a request is aborted and answered 504")] = 600.0
    grace_seconds: Annotated[float, Key(description="for what runs, after SIGTERM")] = 30.0

    def __post_init__(self) -> None:
        check(self, ArgumentError)
        _device(self.device, self.family)

    @property
    def known_names(self) -> frozenset[str]:
        """Returns what clients may call the server."""
        told = (name.strip() for name in (self.names or "").lower().split(","))
        return frozenset({"localhost", self.host.lower(), *filter(None, told)})

    @property
    def where(self) -> str:
        """Returns the device: cpu or cuda."""
        return _device(self.device, self.family)

    def engine(self, source: Source) -> EngineConfig:
        """Makes the engine's config for a model, with limits for a CPU or a GPU where none are given."""
        gpu = self.where == "cuda"
        running, batch = self.max_running or (256 if gpu else 64), self.max_batch_tokens or (8192 if gpu else 2048)
        limits = Limits(running, batch, self.prefill_chunk or (batch if gpu else -(-batch // 4)))
        shape = self._pages(source, limits), self.page_size, self.prefix_cache
        return EngineConfig(*shape, limits, source.dtype, self.where, gpu, gpu, speculate=self.speculate)

    def _pages(self, source: Source, limits: Limits) -> int:
        """On a GPU as many as the fullest card has room for, or as could ever be in use at once."""
        model, width = source.config, source.dtype.itemsize
        if self.where == "cpu":
            return self._host_pages(model, limits, width)
        if self.pages:
            return self.pages
        cards = min(torch.cuda.device_count(), self.tp)
        free, total = zip(*map(torch.cuda.mem_get_info, range(cards)), strict=True)
        taken = max(t - f for f, t in zip(free, total, strict=True))
        room = int((self.gpu_memory_utilization * min(total) - taken) / -(-self.tp // cards)) - _PROCESS
        tokens = tokens_that_fit(model, limits, self.tp, width, room)
        if tokens < self.page_size:
            weights, most = costs.weight_bytes(model, self.tp, width) / 2**30, max(room, 0) / 2**30
            raise ArgumentError(
                f"{weights:.1f} GiB of weights, activations of {limits.max_batch_tokens} tokens and pages do not fit in the "
                f"{most:.1f} GiB of a card that each process may take: raise tp or gpu_memory_utilization, or lower "
                f"max_batch_tokens"
            )
        return min(tokens, limits.max_running * model.max_positions) // self.page_size

    def _host_pages(self, model: ModelConfig, limits: Limits, width: int) -> int:
        """As asked for, or what is enough; no more than the memory that is free, all of which the pages would take at once."""
        enough = -(-max(limits.max_running * min(model.max_positions, 2048), model.max_positions) // self.page_size)
        free = available_memory()
        if not free:  # the system does not say
            return self.pages or enough
        share = 1.0 if self.pages else _HOST_SHARE
        room = int(share * free) // self.tp - ENGINE_PROCESS
        fit = tokens_that_fit(model, limits, self.tp, width, room) // self.page_size
        if fit < max(self.pages, 1):
            weights, page = (
                costs.weight_bytes(model, 1, width) / 2**30,
                costs.token_bytes(model, 1, width) * self.page_size / 2**20,
            )
            raise ArgumentError(
                f"{weights:.1f} GiB of weights, activations of {limits.max_batch_tokens} tokens, logits of "
                f"{limits.max_running} samples and {max(self.pages, 1)} pages of {page:.1f} MiB do not fit in the "
                f"{free / 2**30:.1f} GiB of memory that are free: lower pages, max_running or max_batch_tokens"
            )
        return self.pages or min(enough, fit)


def main(argv: Sequence[str] | None = None) -> None:
    """Serves as the arguments say and exits with the code that tells how it ended."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help", "help"} & set(argv):
        meanings = ranges(ServeConfig)
        keys = ((f"{f.name}={f.default}", meanings[f.name]) for f in fields(ServeConfig))
        print(__doc__, *(f"{key:<28}  {r.meaning or ', '.join(r.choices)}".rstrip() for key, r in keys), sep="\n")
        return
    try:
        config = parse(ServeConfig, argv)
        code = serve(config)
    except BAD_INPUT as error:
        fail(error, 2)
    except RankError as error:
        fail(error, 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except Terminated as error:
        fail(f"ended by {error}", error.code)
    except (MemoryError, RuntimeError) as error:
        if short := shortage(error):
            fail(f"{short}; lower pages, max_batch_tokens or max_running, or end what else uses that memory", 1)
        raise
    sys.exit(code)


def serve(config: ServeConfig) -> int:
    """Starts ranks, engine thread and HTTP server, and serves until told to end; returns the exit code."""
    try:
        from rollout.server.app import build
        from rollout.server.connections import server
        from rollout.server.metrics import Metrics
        from rollout.server.service import Service, ServiceLimits
    except ImportError as error:
        raise ArgumentError(f"{error.name} is not installed: pip install 'samebit[serve]'") from None
    source = Source.open(config.model, config.leaves, config.dtype, config.where, config.adapter, config.format)
    source.config.check_shards(config.tp, "tp", "leaves")
    for line in source.remarks:
        warn(line)
    engine = config.engine(source)
    with _listen(config) as listener:
        if config.model is None:
            _say("no model=DIR: a tiny model of random weights over bytes answers, with nonsense")
        threads = config.threads or max(1, min(8, (os.cpu_count() or 1) // config.tp))
        tokens = f"room for {engine.pages * engine.page_size:,} tokens"
        size = f"{costs.parameter_count(source.config):,} parameters, {source.dtype}"
        _say(f"loading {source.name}: {size}, tp={config.tp}, {tokens}")
        if config.where == "cuda":
            serving = Serving(config.tp, config.page_size, engine.limits.rows, source.config.max_positions)
            prepare(source.config, source.dtype, serving, False, _say, config.family)
        with terminable(), Lockstep(source, engine, config.tp, threads, _progress()) as ranks:
            metrics = Metrics()
            loop = EngineLoop(ranks, metrics)
            key = config.api_key or os.environ.get("SAMEBIT_API_KEY") or None
            limits = ServiceLimits(
                config.max_body, config.body_seconds, config.max_queue, config.request_seconds, api_key=key
            )
            service = Service(source, loop, metrics, limits)
            app = build(service, config.known_names, _info(config, source, engine))
            http = server(app, _connections(config))
            freeze_heap()
            loop.start()
            try:
                return asyncio.run(_until_told(http, service, listener, config))
            finally:
                loop.stop()
                loop.join(10)


def _info(config: ServeConfig, source: Source, engine: EngineConfig) -> dict[str, Any]:
    """What /server_info says of how the server was started."""
    told = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "api_key"}
    shape = {"device": engine.device, "pages": engine.pages, "version": version_of("samebit"), **asdict(engine.limits)}
    return {
        **told,
        **shape,
        "dtype": name_of(source.dtype),
        "leaves": source.config.leaves,
        "format": source.config.format,
    }


def _connections(config: ServeConfig) -> Any:
    from rollout.server.connections import ConnectionLimits

    seconds = config.header_seconds, config.body_seconds + config.request_seconds + _LAST_WORDS
    limits = ConnectionLimits(config.max_connections, *seconds).allowed()
    if limits.most < config.max_connections:
        _say(f"at most {limits.most} connections, not {config.max_connections}: the system allows no more open files")
    return limits


async def _until_told(server: Any, service: Any, listener: socket.socket, config: ServeConfig) -> int:
    """Serves until a signal, then until what runs is done, or until the engine fails."""
    from rollout.server.connections import quiet

    here, told = asyncio.get_running_loop(), asyncio.Event()
    service.loop.on_failure = lambda: here.call_soon_threadsafe(told.set)

    def signalled() -> None:
        if service.draining:
            for peer in service.loop.ranks.peers:
                peer.kill()
            os._exit(143)
        service.draining = True
        _say("draining: a second signal ends at once")
        told.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        here.add_signal_handler(number, signalled)
    quiet(here)
    server.capture_signals = contextlib.nullcontext  # uvicorn's own handlers would close at once
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    listener.listen(2048)  # may wait in the system, of which the event loop accepts some at a time
    _say(f"serving {service.source.name} on http://{config.host}:{listener.getsockname()[1]}")
    await asyncio.wait({serving, asyncio.create_task(told.wait())}, return_when=asyncio.FIRST_COMPLETED)
    deadline = time.monotonic() + config.grace_seconds
    while service.calls and service.loop.failure is None and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    for call in list(service.calls):
        call.give_up()
    server.should_exit = True
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(serving, 10)
    if service.loop.failure is not None:
        report(f"the engine failed: {service.loop.failure}")
        return 1
    _say("all requests are done")
    return 0


def _listen(config: ServeConfig) -> socket.socket:
    """Taken before the weights are loaded: a port in use is an error at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # asyncio sets TCP_NODELAY only where the protocol is named
    except (OSError, UnicodeError) as error:  # the second of a name that no host can have
        raise ArgumentError(f"host={config.host}: {getattr(error, 'strerror', None) or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ArgumentError(f"host={config.host} port={config.port}: {error.strerror or error}") from None
    return listener


def _progress() -> Any:
    last = time.monotonic()

    def tell(done: int, of: int) -> None:
        nonlocal last
        if done == of or time.monotonic() - last > 2:
            last = time.monotonic()
            _say(f"weights: {done} of {of} tensors")

    return tell


@cache
def _device(asked: str, family: str) -> str:
    return choose_device(asked, _say, family)


def _say(text: str) -> None:
    print(f"samebit: {text}", flush=True)


if __name__ == "__main__":
    main()
