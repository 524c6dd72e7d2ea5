"""Requests from clients into the engine's thread and events back; who is refused, and when a request is given up."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from starlette.requests import Request as Client

from rollout.lockstep import Memory
from rollout.loop import EngineLoop, Event, MemoryOrder
from rollout.sampling import Completion, Request, RequestError, Token
from rollout.server.fields import BadRequest
from rollout.server.metrics import Metrics
from rollout.source import Source

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServiceLimits:
    body_bytes: int = 16 * 2**20
    queue: int = 1024  # samples in flight, waiting or running; one more is answered 429
    seconds: float = 600.0  # of one request; then it is aborted and answered 504
    samples: int = 128  # of one request
    api_key: str | None = None


def whole(text: str) -> str:
    """A JSON string may hold what is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest("a text holds half of a surrogate pair, which is no character") from None
    return text


class GivenUp(Exception):
    """The client went away."""


class Service:
    def __init__(self, source: Source, loop: EngineLoop, metrics: Metrics, limits: ServiceLimits) -> None:
        self.source, self.loop, self.metrics, self.limits = source, loop, metrics, limits
        self.engine = loop.ranks.engine
        self.draining = False
        self.asleep = False  # its memory is released
        self.calls: set[Call] = set()
        self._ids = itertools.count()
        self._reader = ThreadPoolExecutor(4, "reader")
        self._reading = 0

    @property
    def in_flight(self) -> int:
        return sum(call.left for call in self.calls)

    def next_id(self) -> int:
        return next(self._ids)

    async def aside(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """`work` in a thread: a text of megabytes takes seconds to read, and nobody else shall wait for it."""
        if self._reading >= self.limits.queue:
            self.metrics.refused.inc()
            raise BadRequest(f"{self._reading} requests are being read, of at most {self.limits.queue}: try later", 429)
        self._reading += 1
        try:
            return await asyncio.wrap_future(self._reader.submit(work, *args, **kwargs))
        finally:
            self._reading -= 1

    def encode(self, text: str) -> tuple[int, ...]:
        if self.source.words is None:
            raise BadRequest("this model has no tokenizer: send token ids")
        return self.source.words.encode(whole(text))

    def call(self, requests: Sequence[Request], client: Client) -> "Call":
        """Puts all of them into the engine, or none."""
        if self.draining:
            raise BadRequest("the server is shutting down", 503)
        if self.loop.failure is not None:
            raise BadRequest(f"the engine has stopped: {self.loop.failure}", 503)
        if self.asleep:
            raise BadRequest("the memory is released: POST /resume_memory_occupation first", 503)
        samples = sum(r.sampling.n for r in requests)
        for request in requests:
            try:
                self.engine.check(request)
            except RequestError as error:
                raise BadRequest(str(error).removeprefix(f"request {request.id}: ")) from None
        if samples > self.limits.queue:
            raise BadRequest(f"{samples} samples in one call are more than the queue of {self.limits.queue}")
        if self.in_flight + samples > self.limits.queue:
            self.metrics.refused.inc()
            raise BadRequest(f"{self.in_flight} samples are in flight, of at most {self.limits.queue}: try later", 429)
        return Call(self, requests, client)

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


class Call:
    """Requests of one HTTP call while they are in the engine. `close` must be called, whatever happens."""

    def __init__(self, service: Service, requests: Sequence[Request], client: Client) -> None:
        self.service, self.requests = service, requests
        self.left = sum(r.sampling.n for r in requests)
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._begin = loop.time()
        self._gone = asyncio.create_task(self._watch(client))
        seconds = service.limits.seconds
        late = BadRequest(f"the request took more than {seconds:g} s and was aborted", 504)
        self._deadline = loop.call_later(seconds, self._queue.put_nowait, late)
        self._closed = False
        service.calls.add(self)
        service.metrics.admitted(requests)

        def sink(event: Event) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, event)

        for request in requests:
            service.loop.submit(request, sink)

    @property
    def seconds(self) -> float:
        return asyncio.get_running_loop().time() - self._begin

    async def _watch(self, client: Client) -> None:
        while (await client.receive())["type"] != "http.disconnect":
            pass
        self._queue.put_nowait(GivenUp())

    def give_up(self) -> None:
        """The server ends."""
        self._queue.put_nowait(BadRequest("the request was aborted: the server is shutting down", 503))

    async def events(self) -> AsyncIterator[Token | Completion]:
        """Until all samples have ended. BadRequest where they could not be."""
        while self.left:
            event = await self._queue.get()
            if isinstance(event, GivenUp | BadRequest):
                raise event
            if isinstance(event, Exception):
                raise BadRequest(f"the engine failed: {' '.join(str(event).split())[:300]}", 500)
            if isinstance(event, Completion):
                self.left -= 1
                if event.finish_reason == "abort":
                    raise BadRequest("the request was aborted", 500)
            yield event

    async def completions(self) -> list[Completion]:
        """In the order of the requests, the samples of each side by side."""
        try:
            done = [event async for event in self.events() if isinstance(event, Completion)]
        finally:
            self.close()
        order = {request.id: i for i, request in enumerate(self.requests)}
        return sorted(done, key=lambda c: (order[c.request_id], c.sample))

    def close(self) -> None:
        """What is still in the engine is aborted, its pages freed."""
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
