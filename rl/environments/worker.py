"""Runs environments in a process of its own: one object for each conversation, whose calls come one after the other while those
of others run beside them.

It is told what to import, says on its pipe what that is, and then answers messages as their calls end. The driver's side is
`hosts.py`; in a run from Python the same loop is a thread of its process.
"""

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from rl.rewards.claim import found, raised
from rl.rewards.worker import Wanted, load, while_the_run_lasts

TOGETHER = 16
"""Conversations of which one process has calls under way at the same time."""

RESET, TOOL, TEACH, END = "reset", "tool", "teach", "end"


class Action(NamedTuple):
    """Asks something of the object of a conversation."""

    what: str  # RESET, TOOL, TEACH or END
    name: str = ""  # of the tool
    arguments: Mapping[str, Any] = {}


class Result(NamedTuple):
    """Says what came of an action."""

    value: Any = None  # RESET, TOOL, TEACH: a text; END: (reward or None, public attributes)
    error: str = ""  # why there is no value, as the end of "the environment ..."
    raised: bool = False  # a tool's exception, which the value tells the policy


class About(NamedTuple):
    """Describes the environments of a factory."""

    name: str
    tools: list[dict[str, Any]]  # JSON schemas, as chat templates take them
    rewards: bool  # it has get_reward
    teaches: bool  # it has teach


def main(handle: int) -> None:
    """Serves calls over the pipe with file descriptor `handle`: first comes what to import, a list of one `Wanted`."""
    while_the_run_lasts(_begin, handle)


def _begin(pipe: Connection) -> None:
    (wanted,) = pipe.recv()
    serve(pipe, wanted, lambda: load(wanted.function))


def serve(pipe: Connection, wanted: Wanted, find: Callable[[], Any]) -> None:
    """Says None once the factory is imported, or a text where that fails, then answers (key, actions) with (key, results), and
    forgets the object of a key at (key, None), until the pipe is closed. No actions ask what the factory makes."""
    try:
        host = _Host(find(), wanted.args)
        pipe.send(None)
    except BaseException as error:  # a module may raise anything: sys.exit is an exception too
        pipe.send(raised(error))
        return
    said = threading.Lock()

    def answer(key: int, actions: Sequence[Action]) -> None:
        results = host.results(key, actions)
        with said:
            try:
                pipe.send((key, results))
            except (OSError, ValueError):  # the run has ended
                return

    with ThreadPoolExecutor(TOGETHER) as threads:
        while True:
            try:
                key, actions = pipe.recv()
            except (EOFError, OSError):
                return
            if actions is None:
                host.forget(key)
            else:
                threads.submit(answer, key, actions)


class _Host:
    """Holds the objects of conversations."""

    def __init__(self, factory: Any, args: Mapping[str, Any]) -> None:
        self._make = lambda: factory(**args)
        self._of: dict[int, Any] = {}
        # One for all coroutines: a client that is kept between them belongs to it
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._name = getattr(factory, "__name__", type(factory).__name__)

    def forget(self, key: int) -> None:
        self._of.pop(key, None)

    def results(self, key: int, actions: Sequence[Action]) -> list[Result]:
        """Does one action after the other, up to the first that fails; without any it describes what the factory makes."""
        if not actions:
            try:
                return [Result(describe(self._make(), self._name))]
            except BaseException as error:
                return [Result(error=raised(error))]
        out: list[Result] = []
        for action in actions:
            out.append(self._result(key, action))
            if out[-1].error:
                break
        return out

    def _result(self, key: int, action: Action) -> Result:
        try:
            if action.what == RESET:
                self._of[key] = self._make()
                return Result(_text(self._awaited(self._of[key].reset, _taken(self._of[key].reset, action.arguments))))
            if action.what == TEACH:
                return Result(_text(self._awaited(self._of[key].teach, {})))
            if action.what == END:
                return self._end(self._of[key])
        except BaseException as error:
            return Result(error=f"raised {raised(error)} in {_METHOD[action.what]}")
        try:
            return Result(_text(self._awaited(getattr(self._of[key], action.name), action.arguments)))
        except Exception as error:  # the policy's to read, as in TRL
            return Result(json.dumps({"error": str(error) or type(error).__name__}), raised=True)
        except BaseException as error:
            return Result(error=f"raised {raised(error)} in {action.name}")

    def _end(self, environment: Any) -> Result:
        reward = self._awaited(environment.get_reward, {}) if hasattr(environment, "get_reward") else None
        judged = found(reward)
        if judged.error:
            return Result(error=f"returned a reward that {judged.error}")
        state = {k: v for k, v in vars(environment).items() if not k.startswith("_") and _is_plain(v)}
        return Result((judged.value, state))

    def _awaited(self, method: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        result = method(**arguments)
        if inspect.isawaitable(result):
            return asyncio.run_coroutine_threadsafe(_as_coroutine(result), self._loop).result()
        return result


_METHOD = {RESET: "reset", TEACH: "teach", END: "get_reward"}
_OWN = (*_METHOD.values(),)


def describe(environment: Any, name: str) -> About:
    """Finds the tools of an environment: every public method but reset, get_reward and teach, with the JSON schema of its
    signature and docstring. TypeError where that says too little."""
    from transformers.utils import get_json_schema

    if not callable(getattr(environment, "reset", None)):
        raise TypeError(f"{name} has no method reset(**row)")
    tools = []
    for method, function in inspect.getmembers(environment, inspect.ismethod):
        if method.startswith("_") or method in _OWN:
            continue
        try:
            tools.append(get_json_schema(function))
        except Exception as error:
            said = " ".join(str(error).split())
            raise TypeError(
                f"{name}.{method} is no tool (types of its arguments, and a docstring with Args:): {said}"
            ) from None
    return About(name, tools, callable(getattr(environment, "get_reward", None)), hasattr(environment, "teach"))


async def _as_coroutine(awaitable: Any) -> Any:
    return await awaitable


def _taken(method: Callable[..., Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those columns of a row that the method has names for, or all where it takes any."""
    parameters = inspect.signature(method).parameters
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return dict(row)
    return {name: value for name, value in row.items() if name in parameters}


def _text(value: Any) -> str:
    """Returns what was returned as a text: None is none, and a list of content blocks is their texts."""
    if value is None:
        return ""
    if isinstance(value, list) and value and all(isinstance(b, Mapping) and "type" in b for b in value):
        if other := next((b["type"] for b in value if b["type"] != "text"), None):
            raise TypeError(f"a content block of type {other!r}: only texts are read")
        return "".join(str(block["text"]) for block in value)
    return str(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, str | int | float | bool)
