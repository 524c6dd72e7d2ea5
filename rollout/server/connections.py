"""Connections, which no client holds for ever or all of, and a log that no client fills."""

import asyncio
import logging
import math
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from kernels.host.command import report

_SPARE_FILES = 64  # that a process may open beside its connections, once it serves
_TURNS = 5  # of the event loop, from accepting a connection to closing another for it
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds how many connections are open, and how long each phase of one may last."""

    most: int = 2048  # open at once
    header_seconds: float = 30.0  # from the beginning of a connection, or its last answer, to the end of headers
    request_seconds: float = 700.0  # from there to the last byte of the answer, a slow client's reading included

    @property
    def burst(self) -> int:
        """Says how many are accepted in one turn of the event loop, which looks at them, and closes some, a few turns later."""
        return min(max(self.most // 16, 8), 128)

    def allowed(self) -> "ConnectionLimits":
        """Allows as many connections as the system lets this process have, whose limit is raised as far as it may be."""
        files = Path("/proc/self/fd")
        taken = _SPARE_FILES + (len(list(files.iterdir())) if files.exists() else _SPARE_FILES)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = taken + self.most + _TURNS * self.burst
        if resource.RLIM_INFINITY != soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        room = self.most if soft == resource.RLIM_INFINITY else (soft - taken) * 3 // 4
        return replace(self, most=max(min(self.most, room), 1))


class Connection(H11Protocol):
    """Serves one connection, every phase of which has an end. Where there are too many, the one that has been silent or
    sending for longest makes room, not one whose request has arrived."""

    limits = ConnectionLimits()

    def connection_made(self, transport: Any) -> None:
        """Starts the clock of the headers; where too many are open, one is cut: the oldest between two requests, or else
        this one."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._latest = 0.0  # when the answer that is on its way is to be read
        self._waits(self.limits.header_seconds)
        others: list[Any] = [c for c in self.connections if c is not self and not c.transport.is_closing()]
        if len(others) < self.limits.most:
            return
        if sending := [c for c in others if c.is_sending]:
            min(sending, key=lambda c: c.since).transport.abort()
        else:
            transport.write(_FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Starts the clock of the request where one has begun."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._latest = self.loop.time() + self.limits.request_seconds
            self._waits(self.limits.request_seconds)

    def on_response_complete(self) -> None:
        """Starts the clock of the next request's headers."""
        self._waits(self.limits.header_seconds)
        super().on_response_complete()

    @property
    def is_sending(self) -> bool:
        """Says whether no request of it is being answered."""
        answered = self.cycle is None or self.cycle.response_complete
        return (answered and not self.transport.get_write_buffer_size()) or (not answered and self.cycle.more_body)

    def _waits(self, seconds: float) -> None:
        self.since = self.loop.time()
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self.transport.get_write_buffer_size() and self.loop.time() < self._latest:
            self._waits(self._latest - self.loop.time())  # for the client to read an answer that was given
        else:
            self.transport.abort()


def server(app: Any, limits: ConnectionLimits) -> uvicorn.Server:
    """Makes a server whose connections keep to them."""
    kind = type("LimitedConnection", (Connection,), {"limits": limits})
    idle = math.ceil(limits.header_seconds)
    how: Any = {"log_level": "warning", "lifespan": "off", "backlog": limits.burst, "timeout_keep_alive": idle}
    return uvicorn.Server(uvicorn.Config(app, http=kind, ws="none", **how))


class Once(logging.Filter):
    """Lets each message pass once a minute."""

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._last: dict[str, float] = {}

    def fresh(self, message: str) -> bool:
        """Says whether the message was not said within the last `seconds`, and remembers it."""
        now = time.monotonic()
        if now - self._last.get(message, -self.seconds) < self.seconds:
            return False
        if len(self._last) > 1000:
            self._last.clear()
        self._last[message] = now
        return True

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets a log record pass where its message and error are fresh."""
        return self.fresh(f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}"[:300])


def quiet(loop: asyncio.AbstractEventLoop) -> None:
    """Logs what goes wrong in `loop` or in uvicorn, in one line where nobody asked for more, and not over and over."""
    once = Once()
    logging.getLogger("uvicorn.error").addFilter(once)

    def handler(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        message, error = str(context.get("message", "")).partition("\n")[0], context.get("exception")
        line = f"{message}: {type(error).__name__}: {error}" if error else message
        if once.fresh(line):
            report(line)

    loop.set_exception_handler(handler)
