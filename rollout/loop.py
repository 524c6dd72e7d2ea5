"""The engine in a thread of its own: takes requests and aborts from other threads, tells them of tokens as they are sampled."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from rollout.lockstep import Lockstep, Memory, News
from rollout.runner import RunnerError
from rollout.sampling import Completion, Request, Token

Event = Token | Completion | Exception
Sink = Callable[[Event], None]
"""Called in the engine's thread; must return at once. An Exception is the last event of its request."""

Order = Literal["forget", "stop"]


@dataclass(frozen=True)
class MemoryOrder:
    """Orders the engine to release or regain memory before its next step."""

    what: Memory
    done: Callable[[Exception | None], None]  # in the engine's thread, once it is done on this rank or could not be


class Watch(Protocol):
    """Hears what the engine does, to measure it."""

    def token(self, request_id: int, sample: int) -> None:
        """Hears of a sampled token."""

    def completion(self, completion: Completion) -> None:
        """Hears of a sample that ended."""

    def step(self, seconds: float, loop: "EngineLoop") -> None:
        """Hears of a step and the seconds that it took."""


class EngineLoop(threading.Thread):
    """Sleeps while there is nothing to do. `failure` says why it ended, if it was not told to."""

    def __init__(self, ranks: Lockstep, watch: Watch) -> None:
        super().__init__(name="engine", daemon=True)
        self.ranks, self.watch = ranks, watch
        self.failure: Exception | None = None
        self.turns = 0  # how often the engine has been at work
        self.on_failure: Callable[[], None] = lambda: None
        self._inbox: queue.SimpleQueue[tuple[Request, Sink] | int | Order | MemoryOrder] = queue.SimpleQueue()
        self._ordered: list[MemoryOrder] = []  # by the news that are being told
        self._sinks: dict[int, tuple[Sink, int]] = {}  # request -> who is told, samples left
        self._lock = threading.Lock()  # between the last event of a failed loop and a late submit
        ranks.engine.on_token = self._token

    def submit(self, request: Request, sink: Sink) -> None:
        """Hands a request to the engine's thread. It must have passed Engine.check."""
        with self._lock:
            if self.failure is None:
                self._inbox.put((request, sink))
                return
        sink(self.failure)

    def abort(self, request_id: int) -> None:
        """Frees its pages before the next step. Its sink hears of it as completions that end in "abort"."""
        self._inbox.put(request_id)

    def forget(self) -> None:
        """Empties the prefix cache before the next step."""
        self._inbox.put("forget")

    def memory(self, order: MemoryOrder) -> None:
        """Releases or regains memory before the next step."""
        self._inbox.put(order)

    def stop(self) -> None:
        """Ends the thread before its next step; what is in flight is dropped."""
        self._inbox.put("stop")

    def run(self) -> None:
        """Takes what other threads ask for and does steps, until `stop`; an error ends everything in flight."""
        try:
            while True:
                news = self._take()
                if news is None:
                    return
                self._turn(news)
        except Exception as error:
            with self._lock:
                self.failure = error
            self._fail(error)
            self.on_failure()

    def _take(self) -> News | None:
        """All that arrived, None if that is the end; waits for something if the engine has nothing to do."""
        requests: list[Request] = []
        aborts: list[int] = []
        forget = False
        block = self.ranks.engine.idle
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                return News(requests, aborts, forget, [order.what for order in self._ordered])
            block = False
            if item == "stop":
                return None
            if item == "forget":
                forget = True
            elif isinstance(item, MemoryOrder):
                self._ordered.append(item)
            elif isinstance(item, int):
                if item in self._sinks:
                    aborts.append(item)
            elif isinstance(item, tuple):
                request, sink = item
                self._sinks[request.id] = (sink, request.sampling.n)
                requests.append(request)

    def _turn(self, news: News) -> None:
        if not news and self.ranks.engine.idle:
            return
        begin = time.perf_counter()
        try:
            completions = self.ranks.turn(news)
        except RunnerError as error:  # the engine dropped all that was in flight, on every rank
            self._fail(error)
            return
        except torch.OutOfMemoryError as error:
            if not self._ordered:
                raise
            self._obeyed(error)
            return
        self.turns += 1
        self._obeyed(None)
        for completion in completions:
            sink, left = self._sinks[completion.request_id]
            self._sinks[completion.request_id] = (sink, left - 1)
            if left == 1:
                del self._sinks[completion.request_id]
            self.watch.completion(completion)
            sink(completion)
        self.watch.step(time.perf_counter() - begin, self)

    def _obeyed(self, error: Exception | None) -> None:
        for order in self._ordered:
            order.done(error)
        self._ordered = []

    def _token(self, token: Token) -> None:
        self.watch.token(token.request_id, token.sample)
        self._sinks[token.request_id][0](token)

    def _end(self, request_id: int, error: Exception) -> None:
        sink, _ = self._sinks.pop(request_id)
        sink(error)

    def _fail(self, error: Exception) -> None:
        for request_id in list(self._sinks):
            self._end(request_id, error)
        while self.failure is not None:
            try:
                item = self._inbox.get(block=False)
            except queue.Empty:
                return
            if isinstance(item, tuple):
                item[1](error)
