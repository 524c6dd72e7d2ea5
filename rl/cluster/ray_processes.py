"""Ray itself: started, watched and ended, with one line for whatever goes wrong with it."""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from rl.cluster.family import TAG, end, family, guarded
from rl.cluster.probe import check_address, token_hint
from rl.config import ClusterSection
from rl.errors import RunError, UserError

_OBJECT_STORE = 256 * 2**20
_ANSWER = 5.0  # seconds for a server to accept
_GONE = 25.0  # seconds without an answer, after which a server is lost
_END = 20.0  # seconds for Ray to end by itself

_half_ended = threading.Event()  # Ray was interrupted while it started, or did not end: its servers have been killed


_silent: dict[str, float] = {}  # servers that do not answer, and since when


class RayLost(RunError):
    """Says that Ray's own processes have ended: no rank can be called any more."""


@contextlib.contextmanager
def session(
    config: ClusterSection, processes: int, log: Path, meanwhile: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Starts Ray, and does `meanwhile` while its servers begin; on the way out, however that is, ends all its processes, and
    where that is a kill, `log` says so. UserError where it cannot start here, RunError where it takes above `config.timeout`
    seconds."""
    tag, over, started = uuid.uuid4().hex, threading.Event(), False
    with guarded(tag, log):
        try:
            _start_ray(config, processes, tag, over, meanwhile)
            started = True
            yield
        finally:
            _end_ray(tag, started)
            over.set()


@contextlib.contextmanager
def left_at_once() -> Iterator[None]:
    """Ends this process with the exit code of what is inside, at once where Ray was interrupted while it started: Python's own
    exit would wait for servers that have been killed, ten seconds or for ever. For a command's last line alone."""
    try:
        yield
    except SystemExit as end:
        if _half_ended.is_set() and isinstance(end.code, int):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise


def check_ray() -> None:
    """Raises RayLost where a process of Ray's has ended on which all others depend. Ray itself ends this process then, without
    a word: at once where an object is put or read, else after a minute or longer."""
    if not ray.is_initialized():
        return
    for name, host, port in _servers(ray.get_runtime_context().get_node_id()):
        try:
            socket.create_connection((host, port), timeout=_ANSWER).close()
            _silent.pop(name, None)
        except ConnectionError as error:
            raise RayLost(f"Ray's {name} ({host}:{port}) has ended: {error.strerror}") from None
        except OSError:  # too busy to answer, or on another node, which may be out of reach
            since = _silent.setdefault(name, time.monotonic())
            if time.monotonic() - since > _GONE:
                raise RayLost(
                    f"Ray's {name} ({host}:{port}) has not answered for {_GONE:.0f} s: the network or its node is lost; once "
                    f"it is back, the same command goes on from the last checkpoint"
                ) from None


@lru_cache(maxsize=1)
def _servers(node: str) -> tuple[tuple[str, str, int], ...]:
    """(name, host, port) of the GCS, which knows all processes, and of this node's raylet, which starts them."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    found = [("GCS", host, int(port))] if port.isdigit() else []
    here = [n for n in ray.nodes() if n["NodeID"] == node and n["Alive"]]
    return *found, *(("raylet", n["NodeManagerAddress"], n["NodeManagerPort"]) for n in here)


def _start_ray(
    config: ClusterSection, processes: int, tag: str, over: threading.Event, meanwhile: Callable[[], object]
) -> None:
    """Until `over`, a thread stays from which Ray was started: Linux ends Ray's processes with that thread."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
    local: dict[str, Any] = {}
    if config.address == "local":
        local = {"num_cpus": max(processes, 1), "object_store_memory": _OBJECT_STORE, "include_dashboard": False}
    else:
        check_address(config.address)
    started, failure = threading.Event(), list[Exception]()

    deadline = time.monotonic() + config.timeout

    def start() -> None:
        while not _started(config.address, local, failure):
            # A bare Exception is Ray's own limit of 30 s, which a busy machine passes: it has until ours.
            if type(failure[-1]) is not Exception or time.monotonic() > deadline or os.environ.get(TAG) != tag:
                break
            ray.shutdown()
            end(tag, family(tag, set()), patience=0)
        started.set()
        over.wait()

    logging.getLogger("ray").setLevel(logging.CRITICAL)  # what it raises is said here, in one line
    _hush_threads()
    os.environ[TAG] = tag
    try:
        # In a thread: Ray sets no handlers of signals there, and what waits here hears them, and a clock.
        threading.Thread(target=start, name="ray.init", daemon=True).start()
        meanwhile()
        in_time = started.wait(deadline - time.monotonic())
    finally:
        del os.environ[TAG]
    at = f"(cluster.address={config.address})"
    if not in_time:
        raise RunError(f"Ray did not start within cluster.timeout={config.timeout} s {at}")
    if not ray.is_initialized():
        raise unstarted(failure[-1], at)


def _hush_threads() -> None:
    """Keeps off stderr, for as long as this process lives, the tracebacks of Ray's threads: they listen to servers that are
    killed at the end, and what is lost before that is said in one line."""
    before = threading.excepthook
    if getattr(before, "__name__", "") != "of_others":

        def of_others(args: threading.ExceptHookArgs) -> None:
            if args.thread is None or not args.thread.name.startswith("ray"):
                before(args)

        threading.excepthook = of_others


def _started(address: str, local: dict[str, Any], failure: list[Exception]) -> bool:
    """Whether ray.init did; else `failure` says why at its end. Ray raises many kinds."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL, **local)
    except Exception as error:
        failure.append(error)
        return False
    return True


def unstarted(error: Exception, at: str) -> Exception:
    """Returns what to say where ray.init raised `error`."""
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        hint = f"its folder is {folder}; set RAY_TMPDIR to another, short and writable"
        return UserError(f"Ray did not start {at}: {reason}: {hint}")
    if isinstance(error, ConnectionError | RuntimeError | ValueError | AuthenticationError):
        return UserError(f"Ray did not start {at}: {reason}{_about_token(error)}")
    return RunError(f"Ray did not start {at}: {reason or type(error).__name__}")


def _about_token(error: Exception) -> str:
    """Hints at the token where Ray says that it is wrong, or says only that it could not connect to a server that answers."""
    if not isinstance(error, AuthenticationError) and "Failed to connect to Ray cluster" not in str(error):
        return ""
    return f": {token_hint()}"


def _end_ray(tag: str, started: bool) -> None:
    """Also ends what Ray leaves behind where it was interrupted before it had `started`, or does not end by itself."""
    left = family(tag, set())
    thread = threading.Thread(target=ray.shutdown, name="ray.shutdown", daemon=True)
    thread.start()
    thread.join(_END)
    end(tag, left, patience=3)
    if not started or thread.is_alive():
        _half_ended.set()
    _servers.cache_clear()
    _silent.clear()
