"""Runs rewards in a process of its own: whatever they do there (raise, exit, crash), the run can say so.

It is told what to import, says on its pipe how that went, and then answers one message of calls after the other. It ends with
the run, however that ends, and what it has started with it.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rl.rewards.claim import Claim, Found, raised
from rl.rewards.styles import Function

TOGETHER = 64
"""Async calls that one process awaits at the same time."""
_FAREWELL = 1.0  # seconds in which a process that is between two calls ends as others do


class Wanted(NamedTuple):
    """Names a function and the keyword arguments of its calls."""

    function: str
    args: Mapping[str, Any]


class Call(NamedTuple):
    """Asks one function about one claim, or about all claims of one problem where it is `batched`."""

    function: int  # of those that the process was told to import
    claims: tuple[Claim, ...]


class Kind(NamedTuple):
    """Says how a function is called."""

    batched: bool
    is_async: bool


def main(handle: int) -> None:
    """Serves calls over the pipe with file descriptor `handle`: first comes what to import, a list of `Wanted`."""
    while_the_run_lasts(_serve, handle)


def while_the_run_lasts(serve: Callable[[Connection], None], handle: int) -> None:
    """Serves the pipe with file descriptor `handle` until the run ends or lets it go. Whatever is read or said then, an answer
    that nobody read among it, has nobody to hear of it."""
    threading.Thread(target=_end_with_the_run, args=(handle,), daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(handle))


def _serve(pipe: Connection) -> None:
    functions: list[Function] = []
    try:
        for wanted in pipe.recv():
            functions.append(Function(load(wanted.function), wanted.args))
        pipe.send([Kind(f.batched, f.is_async) for f in functions])
    except BaseException as error:  # a module may raise anything: sys.exit is an exception too
        pipe.send((len(functions), raised(error)))
        return
    loop = asyncio.new_event_loop()  # one for all calls: a client that is kept between them belongs to it
    loop.set_default_executor(ThreadPoolExecutor(TOGETHER))  # no call that is awaited waits for a thread
    while True:
        calls, limit = pipe.recv()
        if len(calls) == 1 and not functions[calls[0].function].is_async:
            pipe.send([_alone(functions[calls[0].function], calls[0].claims, loop)])
        else:
            pipe.send(loop.run_until_complete(_together(functions, calls, limit)))


def load(name: str) -> Any:
    """Imports what "module:function" or "path/to/file.py:function" names."""
    where, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(f"no ':' and no function after {name!r}")
    found: Any = (
        _of_file(Path(where).expanduser().resolve()) if where.endswith(".py") else importlib.import_module(where)
    )
    for part in function.split("."):
        found = getattr(found, part)
    return found


@cache
def _of_file(path: Path) -> ModuleType:
    """Imports a file, once, under its own name if that is free; what lies beside it can be imported there."""
    sys.path.insert(0, str(path.parent))
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    name = f"reward_{len(sys.modules)}_{path.stem}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _alone(function: Function, claims: Sequence[Claim], loop: asyncio.AbstractEventLoop) -> list[Found]:
    try:
        result, read = function.start(claims)  # outside of the loop: it may run one of its own
        return read(loop.run_until_complete(result) if inspect.isawaitable(result) else result)
    except BaseException as error:
        return [Found(error=f"raised {raised(error)}")] * len(claims)


async def _together(functions: Sequence[Function], calls: Sequence[Call], limit: float) -> list[list[Found]]:
    return list(await asyncio.gather(*(_awaited(functions[c.function], c.claims, limit) for c in calls)))


async def _awaited(function: Function, claims: Sequence[Claim], limit: float) -> list[Found]:
    try:
        async with asyncio.timeout(limit) as clock:
            result, read = function.start(claims)
            return read(await result)
    except BaseException as error:
        how = late(limit) if clock.expired() else f"raised {raised(error)}"
        return [Found(error=how)] * len(claims)


def late(limit: float) -> str:
    """Says that a call took longer than `limit` seconds."""
    return f"took more than {limit:g} s (scoring.timeout; a clock decides that, and another machine may be faster)"


def _end_with_the_run(handle: int) -> None:
    """Waits until the run has let go of its end: a call that is under way then has nobody to answer to."""
    poll = select.poll()
    poll.register(handle, 0)
    poll.poll()
    time.sleep(_FAREWELL)
    os.killpg(0, signal.SIGKILL)
