"""Runs a user's reward in a process of its own: whatever it does there (raises, exits, crashes), the run can say so.

It imports "module:function", says on its pipe how that went, and then answers one call after the other. It ends with the run,
however that ends.
"""

import importlib
import os
import select
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

Answer = tuple[Literal["value", "raised"], Any]
"""What a call returned, or what it raised as a text."""

_FAREWELL = 1.0  # seconds in which a process that is between two calls ends as others do


def main(handle: int, name: str) -> None:
    threading.Thread(target=_end_with_the_run, args=(handle,), daemon=True).start()
    pipe = Connection(handle)
    how, function = _outcome(_load, name)
    pipe.send((how, None if how == "value" else function))
    while True:
        try:
            problem, text = pipe.recv()
        except EOFError:
            return
        pipe.send(_outcome(_judge, function, problem, text))


def _load(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _judge(function: Any, problem: Any, text: str) -> float:
    return float(function(problem, text))


def _outcome(call: Callable[..., Any], *arguments: Any) -> Answer:
    try:
        return "value", call(*arguments)
    except BaseException as error:  # it may raise anything: sys.exit is an exception too
        return "raised", _told(error)


def _told(error: BaseException) -> str:
    try:
        text = str(error)
    except BaseException:
        text = "and its text cannot be made"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _end_with_the_run(handle: int) -> None:
    """Waits until the run has let go of its end: a call that is under way then has nobody to answer to."""
    poll = select.poll()
    poll.register(handle, 0)
    poll.poll()
    time.sleep(_FAREWELL)
    os._exit(1)
