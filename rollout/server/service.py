"""Requests from clients into the engine's thread and events back; who is refused, and when a request is given up.

Nothing but waiting happens in the event loop: bodies and texts are read, and answers written, in threads.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

from starlette.requests import Request as Client

from rollout.lockstep import Memory
from rollout.loop import EngineLoop, Event, MemoryOrder
from rollout.sampling import Completion, Request, RequestError, SamplingParams, Token
from rollout.server.bodies import BadRequest
from rollout.server.metrics import Metrics
from rollout.server.words import Words
from rollout.source import Source

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_BODIES = 16  # of the largest size, that are in memory at once
_LINGER = 5.0  # seconds to read on what is refused


@dataclass(frozen=True)
class ServiceLimits:
    """Bounds what clients may ask for at once, and how long it may take."""

    body_bytes: int = 16 * 2**20
    body_seconds: float = 60.0  # for a body to arrive
    queue: int = 1024  # samples in flight, waiting or running; one more is answered 429
    seconds: float = 600.0  # of one request; then it is aborted and answered 504
    samples: int = 128  # of one request
    api_key: str | None = None


class Answer(Protocol):
    """Holds one call, read: what it asks of the engine, and how the client is told, in JSON. No method runs in the event
    loop."""

    requests: Sequence[Request]
    names: Sequence[str]  # of each request, by which a client aborts it
    stream: bool

    def whole(self, completions: Sequence[Completion], seconds: float) -> bytes:
        """Returns the body of the answer; the completions are in the order of the requests, the samples of each side by
        side."""


class Streamed(Answer, Protocol):
    """Declares an answer that can be told in events."""

    def opening(self) -> list[str]:
        """Returns the events that come before the first token."""

    def chunks(self, events: Sequence[Token | Completion], seconds: float) -> list[str]:
        """Returns the events of what has happened since the last call."""

    def closing(self) -> list[str]:
        """Returns the events that come after all samples have ended."""


class GivenUp(Exception):
    """Says that the client went away."""


class Service:
    """Admits requests to the engine's thread, and brings its events to the calls that wait for them."""

    def __init__(self, source: Source, loop: EngineLoop, metrics: Metrics, limits: ServiceLimits) -> None:
        self.source, self.loop, self.metrics, self.limits = source, loop, metrics, limits
        self.words, self.engine = Words(source), loop.ranks.engine
        self.draining = False
        self.asleep = False  # its memory is released
        self.calls: set[Call] = set()
        self._ids = itertools.count()
        self._readers, self._writers = ThreadPoolExecutor(4, "reader"), ThreadPoolExecutor(4, "writer")
        self._reading = self._body_bytes = 0

    @property
    def in_flight(self) -> int:
        """Counts the samples that wait or run."""
        return sum(call.left for call in self.calls)

    def next_id(self) -> int:
        """Returns an id that no request had before."""
        return next(self._ids)

    async def take(self, client: Client, work: Callable[[bytes], Result]) -> Result:
        """Returns what `work` makes of the body, in a thread."""
        limit, seconds = self.limits.body_bytes, self.limits.body_seconds
        length, parts, body = client.headers.get("content-length", "0"), client.stream(), bytearray()
        if length.isdigit() and int(length) > limit:
            raise await self._too_large(parts)
        try:
            async with asyncio.timeout(seconds) as arriving:
                async for part in parts:
                    body += part
                    self._body_bytes += len(part)
                    if len(body) > limit:
                        arriving.reschedule(None)
                        raise await self._too_large(parts)
                    if self._body_bytes > _BODIES * limit:
                        raise self._refused(f"{self._body_bytes} bytes of bodies are being read")
                arriving.reschedule(None)
                return await self.read(work, bytes(body))
        except TimeoutError:
            raise BadRequest(f"the body took more than {seconds:g} s to arrive", 408) from None
        finally:
            self._body_bytes -= len(body)

    async def _too_large(self, rest: AsyncIterator[bytes]) -> BadRequest:
        """Reads on for a moment, and keeps nothing: a client that sends all of its body before it reads would find the
        connection cut, and not the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                async for _ in rest:
                    pass
        return BadRequest(f"the body is larger than {self.limits.body_bytes} bytes", 413)

    async def read(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Runs `work` in a thread: a text of megabytes takes seconds to read, and nobody else shall wait for it."""
        if self._reading >= self.limits.queue:
            raise self._refused(f"{self._reading} requests are being read, of at most {self.limits.queue}")
        self._reading += 1
        try:
            return await _aside(self._readers, work, *args, **kwargs)
        finally:
            self._reading -= 1

    async def write(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Does the same for what was admitted, which waits for nobody's reading."""
        return await _aside(self._writers, work, *args, **kwargs)

    def _refused(self, why: str) -> BadRequest:
        self.metrics.refused.inc()
        return BadRequest(f"{why}: try later", 429)

    def request(
        self, ids: Sequence[int], sampling: SamplingParams, score_from: int | None = None, top: int = 0
    ) -> Request:
        """Refuses what can never be served. In any thread."""
        made = Request(self.next_id(), tuple(ids), sampling, score_from, top)
        try:
            self.engine.check(made)
        except RequestError as error:
            raise BadRequest(str(error).removeprefix(f"request {made.id}: ")) from None
        return made

    def check_awake(self) -> None:
        """Refuses with 503 where the engine has failed, the server ends, or the memory is released."""
        if self.loop.failure is not None:
            raise BadRequest(f"the engine has stopped: {self.loop.failure}", 503)
        if self.draining:
            raise BadRequest("the server is shutting down", 503)
        if self.asleep:
            raise BadRequest("the memory is released: POST /resume_memory_occupation first", 503)

    def call(self, answer: Answer, client: Client) -> "Call":
        """Puts all of its requests into the engine, or none."""
        self.check_awake()
        samples = sum(r.sampling.n for r in answer.requests)
        if samples > self.limits.queue:
            raise BadRequest(f"{samples} samples in one call are more than the queue of {self.limits.queue}")
        if self.in_flight + samples > self.limits.queue:
            raise self._refused(f"{self.in_flight} samples are in flight, of at most {self.limits.queue}")
        return Call(self, answer, client)

    def abort(self, prefix: str) -> None:
        """Ends the requests whose names begin with it, as "abort" with what they have."""
        for call in self.calls:
            for request, name in zip(call.requests, call.names, strict=True):
                if name.startswith(prefix):
                    self.loop.abort(request.id)

    async def works(self, seconds: float) -> bool:
        """Says whether the engine does a step within that time: of what it is at, or for a token that is asked for here."""
        before, now = self.loop.turns, asyncio.get_running_loop().time
        if not self.in_flight:
            self.loop.submit(Request(self.next_id(), (0,), SamplingParams(1)), lambda event: None)
        end = now() + seconds
        while self.loop.turns == before and self.loop.failure is None and now() < end:
            await asyncio.sleep(0.02)
        return self.loop.turns > before and self.loop.failure is None

    async def release(self, weights: bool) -> None:
        """Gives the memory of keys and values back, with `weights` that of the weights too. 409 while requests run."""
        if self.calls:
            raise BadRequest(f"{self.in_flight} samples are in flight: wait for them, or abort them", 409)
        self.asleep = True
        await self._order("release all" if weights else "release pages")

    async def resume(self) -> None:
        """Regains it. 503 where the device has too little; it can be tried again."""
        await self._order("resume")
        self.asleep = False

    async def _order(self, what: Memory) -> None:
        here = asyncio.get_running_loop()
        done: asyncio.Future[Exception | None] = here.create_future()

        def tell(error: Exception | None) -> None:
            here.call_soon_threadsafe(done.set_result, error)

        self.loop.memory(MemoryOrder(what, tell))
        while not done.done() and self.loop.failure is None:
            await asyncio.wait({done}, timeout=0.1)
        if self.loop.failure is not None:
            raise BadRequest(f"the engine has stopped: {self.loop.failure}", 503)
        if error := done.result():
            raise BadRequest(f"there is too little memory: {' '.join(str(error).split())[:300]}", 503)


async def _aside(
    threads: Executor, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    return await asyncio.wrap_future(threads.submit(work, *args, **kwargs))


class Call:
    """Holds the requests of one HTTP call while they are in the engine. `close` must be called, whatever happens."""

    def __init__(self, service: Service, answer: Answer, client: Client) -> None:
        self.service, self.requests, self.names = service, answer.requests, answer.names
        self.left = sum(r.sampling.n for r in self.requests)
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._begin = loop.time()
        self._gone = asyncio.create_task(self._watch(client))
        seconds = service.limits.seconds
        late = BadRequest(f"the request took more than {seconds:g} s and was aborted", 504)
        self._deadline = loop.call_later(seconds, self._queue.put_nowait, late)
        self._closed = False
        service.calls.add(self)
        service.metrics.admitted(self.requests)
        stream = answer.stream

        def sink(event: Event) -> None:
            if stream or not isinstance(event, Token):
                loop.call_soon_threadsafe(self._queue.put_nowait, event)

        for request in self.requests:
            service.loop.submit(request, sink)

    @property
    def seconds(self) -> float:
        """Returns the seconds since the call was read."""
        return asyncio.get_running_loop().time() - self._begin

    async def _watch(self, client: Client) -> None:
        while (await client.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(GivenUp())

    def give_up(self) -> None:
        """Gives the call up, as the server ends."""
        self._queue.put_nowait(BadRequest("the request was aborted: the server is shutting down", 503))

    async def events(self) -> AsyncIterator[list[Token | Completion]]:
        """Yields what has happened since the last was taken, until all samples have ended. BadRequest where they could not
        be."""
        while self.left:
            event, batch = await self._queue.get(), []
            while not isinstance(event, Exception):
                batch.append(event)
                self.left -= isinstance(event, Completion)
                if self._queue.empty():
                    break
                event = self._queue.get_nowait()
            if batch:
                yield batch
            if isinstance(event, GivenUp | BadRequest):
                raise event
            if isinstance(event, Exception):
                raise BadRequest(f"the engine failed: {' '.join(str(event).split())[:300]}", 500)

    async def completions(self) -> list[Completion]:
        """Waits for all completions, in the order of the requests, the samples of each side by side."""
        try:
            done = [event async for batch in self.events() for event in batch if isinstance(event, Completion)]
        finally:
            self.close()
        order = {request.id: i for i, request in enumerate(self.requests)}
        return sorted(done, key=lambda c: (order[c.request_id], c.sample))

    def close(self) -> None:
        """Aborts what is still in the engine, which frees its pages."""
        if self._closed:
            return
        self._closed = True
        self._gone.cancel()
        self._deadline.cancel()
        if self.left:
            self.service.metrics.aborted.inc()
            for request in self.requests:
                self.service.loop.abort(request.id)
        self.left = 0
        self.service.metrics.forget(self.requests)
        with contextlib.suppress(KeyError):
            self.service.calls.remove(self)
