"""Serves /inference/v1/generate by the run's engines: what clients ask becomes requests of a step."""

import asyncio
import contextlib
import queue
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rl.errors import UserError
from rollout.sampling import Completion, Request, RequestError

if TYPE_CHECKING:
    from rollout.source import Source

    Sink = Callable[[Completion | Exception], None]

NAME = "policy"
"""What the model is called there."""
FULL = "the maximum context length is reached"
"""Says that a conversation has no room for another token, in words that clients know."""


@dataclass(frozen=True)
class Asked:
    """Holds a request of a client, and who waits for its completion."""

    request: Request
    sink: "Sink"


@dataclass(eq=False)
class Inbox:
    """Stands for an engine's thread (`rollout.loop.EngineLoop`): keeps what is submitted for who drives the engines."""

    longest: int  # tokens of a conversation
    vocabulary: int
    waiting: "queue.SimpleQueue[Asked]" = field(default_factory=queue.SimpleQueue)
    failure: Exception | None = None
    turns: int = 0
    version: int = 0
    full: set[int] = field(
        default_factory=set
    )  # seeds of conversations that have asked for more than there is room for

    @property
    def ranks(self) -> "Inbox":
        """Returns what has the engine."""
        return self

    @property
    def engine(self) -> "Inbox":
        """Returns what checks requests."""
        return self

    def check(self, request: Request) -> None:
        """Raises RequestError where the conversation has no room left, or its tokens are none of the model's."""
        if not request.prompt_ids:
            raise RequestError("the prompt is empty")
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.vocabulary:
            raise RequestError(f"a prompt id is outside the vocabulary of {self.vocabulary}")
        if len(request.prompt_ids) >= self.longest:
            self.full.add(request.sampling.seed)
            raise RequestError(f"{FULL}: {len(request.prompt_ids)} of {self.longest} tokens (environment.max_tokens)")

    def submit(self, request: Request, sink: "Sink") -> None:
        """Keeps a request; in the server's thread."""
        self.waiting.put(Asked(request, sink))

    def abort(self, request_id: int) -> None:
        """Lets it be sampled to its end, which nobody hears of."""


def refusal(why: str) -> Exception:
    """Makes what a client is told where its request is refused."""
    from rollout.server.bodies import BadRequest

    return BadRequest(why)


class Line:
    """Holds the server, in a thread of this process, on a port of the loopback address that the system chooses."""

    def __init__(self, source: "Source", longest: int) -> None:
        """`longest`: tokens of a conversation. UserError where the server's packages are missing."""
        try:
            from rollout.server.app import build_tokens
            from rollout.server.connections import ConnectionLimits, quiet, server
            from rollout.server.metrics import Metrics
            from rollout.server.service import Service, ServiceLimits
        except ImportError as error:
            raise UserError(
                f"environment.name=verifiers: {error.name} is not installed: pip install 'samebit[verifiers]'"
            ) from None
        self.inbox, self.key = Inbox(longest, source.config.vocab_size), secrets.token_hex(16)
        forever = 1e9
        limits = ServiceLimits(queue=2**20, seconds=forever, api_key=self.key)
        engine: Any = self.inbox
        service = Service(source, engine, Metrics(), limits)
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(2048)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._http = server(build_tokens(service), ConnectionLimits(request_seconds=forever).allowed())
        self._http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        self._quiet = quiet
        self._thread = threading.Thread(target=self._serve, name="line", daemon=True)

    def open(self) -> None:
        """Serves, if it does not yet, until the process ends."""
        if not self._thread.is_alive():
            self._thread.start()

    def _serve(self) -> None:
        async def serve() -> None:
            self._quiet(asyncio.get_running_loop())
            await self._http.serve(sockets=[self._listener])

        asyncio.run(serve())
