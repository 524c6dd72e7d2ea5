"""Calls that run on ranks in other processes: their results, or the one failure that explains the others."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError as KilledForMemory
from ray.exceptions import RayActorError, RayError, RayTaskError

from kernels.host.command import Terminated
from kernels.host.failures import OutOfMemory as NoMemory
from kernels.host.failures import RankLost
from kernels.host.memory import available_memory
from rl.cluster.ray_processes import check_ray
from rl.cluster.watch import GOES_ON, Rank, Watch, lost_node, node_lost
from rl.errors import BAD_INPUT, LostError, RunError, SaveError
from rl.memory import OutOfMemory
from trainer.checkpoint import CheckpointError

_TICK = 1.0  # seconds between two looks at the processes of the ranks that have not answered
_MOMENT, _DEATH = 0.5, 10.0  # seconds to wait for the other ranks' failures, and for the one that explains them
_LOST = 2  # the severity of a collective that another rank left


Calls = dict[Any, Rank]
"""Results that are awaited (Ray's references), and whose."""


@contextlib.contextmanager
def _signals_heard() -> Iterator[None]:
    """Raises what the handler of a signal raised while Ray waited, and not the SystemError that Ray makes of it."""
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, KeyboardInterrupt | Terminated):
            raise error.__cause__ from None
        raise


@_signals_heard()
def gather(calls: Calls, timeout: float | None = None, patience: float | None = None) -> list[Any]:
    """Returns the results of all calls, in order. The first failure ends the wait: the others would hang in a collective. Of
    the failures that arrive within a moment, a death or a Python error outranks the broken connections it causes. RunError
    too after `timeout` seconds, where a rank is stopped for `patience` seconds, and where Ray itself is lost."""
    waiting, failures = list(calls), list[tuple[str, RayError]]()
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    watch = Watch(patience)
    while waiting:
        ready, left = ray.wait(waiting, timeout=max(0.0, min(_TICK, deadline - time.monotonic())))
        if not failures and (not ready or len(waiting) == len(calls)):  # nobody answers, or the first one did
            check_ray()
        waiting = left
        for reference in ready:
            try:
                ray.get(reference)
            except RayError as error:
                failures.append((calls[reference].name, error))
        if failures and ready:  # connections broken alone: the death that broke them is on its way
            explained = any(_severity(error) < _LOST for _, error in failures)
            deadline = time.monotonic() + (_MOMENT if explained else _DEATH)
        elif not ready and time.monotonic() >= deadline:
            break
        if not ready and not failures:
            watch.look(calls[reference] for reference in waiting)
    if failures:
        raise _explained(failures, list(calls.values()))
    if waiting:
        raise RunError(f"{calls[waiting[0]].name} did not answer within {timeout:.0f} s")
    return ray.get(list(calls))


@_signals_heard()
def first(groups: Sequence[Calls], patience: float | None = None) -> int:
    """Returns which of `groups` has all its results, or the failure of a call: the first of those that do. RunError as of
    `gather`, which is to be called on it next."""
    watch, left = Watch(patience), [list(calls) for calls in groups]
    while True:
        ready, _ = ray.wait([reference for calls in left for reference in calls], timeout=_TICK)
        check_ray()
        if not ready:
            watch.look(rank for calls in groups for rank in calls.values())
        for i, calls in enumerate(left):
            if any(reference in ready and _failed(reference) for reference in calls):
                return i
            left[i] = [reference for reference in calls if reference not in ready]
            if not left[i]:
                return i


def _failed(reference: Any) -> bool:
    try:
        ray.get(reference)
    except RayError:
        return True
    return False


@_signals_heard()
def settle(calls: Calls) -> None:
    """Waits a moment for what can still answer."""
    if able := [reference for reference, rank in calls.items() if not rank.lost]:
        ray.wait(able, num_returns=len(able), timeout=_DEATH)


def _explained(failures: list[tuple[str, RayError]], ranks: Sequence[Rank]) -> Exception:
    """Returns what to raise of the failures of some of the ranks: a node that was lost comes before what its end broke."""
    cause = root_cause(failures)
    if not isinstance(cause, LostError) and all(_severity(error) for _, error in failures):
        return cause
    if (gone := lost_node(ranks)) is not None:
        return LostError(f"{node_lost(gone)}: {GOES_ON}")
    pulse = ranks[0].pulse
    if isinstance(cause, LostError) and pulse is not None and (absent := pulse.absent()):
        return LostError(f"{absent}: {cause}")
    return cause


def _severity(error: RayError) -> int:
    """0 for a process that died, 1 for an exception of its own, _LOST for what these do to the other ranks."""
    if isinstance(error, RayActorError):
        return 0
    return _LOST if isinstance(error, RayTaskError) and isinstance(error.cause, RankLost) else 1


def root_cause(failures: list[tuple[str, RayError]]) -> Exception:
    """Returns what to raise of the failures (rank, what Ray says): the driver's own exception for the gravest."""
    name, error = min(failures, key=lambda failure: _severity(failure[1]))
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = " ".join(str(cause).split())[:400]
    match cause:
        case _ if isinstance(cause, BAD_INPUT):
            return cause
        case NoMemory():
            return OutOfMemory(name, cause.asked, cause.free or available_memory())
        case KilledForMemory():
            return OutOfMemory(name)
        case CheckpointError():
            return SaveError(f"{name}: {text}")
        case RankLost():
            return LostError(f"{name} lost another rank, and none says why: {text}")
    return RunError(f"{name} failed: {type(cause).__name__}: {text}")
