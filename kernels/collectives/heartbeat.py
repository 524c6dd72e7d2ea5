"""A sign of life of every rank, once a second, through the store where the ranks met: that its process runs, and where it is.

A process that stands still (a signal, a debugger, a call that never returns and holds the interpreter) or that is cut off gives
no sign; one that waits for others in a collective does, and says in which.
"""

import itertools
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from kernels.collectives.rendezvous import connect

PERIOD = 1.0  # seconds
_PACKAGES = Path(__file__).resolve().parents[2]
_OURS = tuple(f"{_PACKAGES / name}/" for name in ("kernels", "rollout", "trainer"))
_COLLECTIVES = "torch/distributed/distributed_c10d.py"


@dataclass(frozen=True)
class Beat:
    """Says where a rank was."""

    number: int  # of the beat
    call: str  # what the driver asked of it: a method of its actor; "" where it waits for the driver
    line: str  # the innermost line of ours: file:line and function
    collective: str  # the collective of torch in which it waits; "" outside of one
    count: int = 0  # collectives that its default group has begun

    def __str__(self) -> str:
        if not self.call:
            return "waited for a call"
        inside = f", waiting in {self.collective} (number {self.count})" if self.collective else ""
        return f"was in {self.call} at {self.line}{inside}"


class Heartbeat:
    """Beats from a thread of its own, over a connection of its own, until the process or the store ends."""

    def __init__(self, name: str, store: str) -> None:
        """`name`: of this rank, among all. `store`: tcp://host:port."""
        self._key, self._store, self._over = key_of(name), connect(store), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Beats no more."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        for number in itertools.count(1):
            try:
                self._store.set(self._key, json.dumps(asdict(where(number))))
            except RuntimeError:  # the driver is gone, or out of reach: it will not hear of this rank
                return
            if self._over.wait(PERIOD):
                return


class Heard:
    """Holds what is heard of ranks, for the process that has the store."""

    def __init__(self, store: dist.TCPStore, names: Sequence[str]) -> None:
        self._store, self._names = store, list(names)
        for name in names:
            store.set(key_of(name), "")

    def beats(self) -> dict[str, Beat]:
        """Returns the last beat of every rank that has begun."""
        told = self._store.multi_get([key_of(name) for name in self._names])
        return {name: Beat(**json.loads(text)) for name, text in zip(self._names, told, strict=True) if text}


def key_of(name: str) -> str:
    """Returns where in the store the beats of a rank are."""
    return f"heartbeat of {name}"


def where(number: int) -> Beat:
    """Finds out where this process is, by the stacks of its threads."""
    own, found = threading.get_ident(), Beat(number, "", "", "", _count())
    for thread, frame in sys._current_frames().items():
        if thread == own:
            continue
        stack = list(_stack(frame))
        calls = [f for f in stack if f.f_code.co_filename.endswith("/actor.py") and _ours(f)]
        collective = next((f.f_code.co_name for f in reversed(stack) if _of_torch(f)), "")
        ours = next((f for f in stack if _ours(f)), None)
        if calls or (collective and ours):
            call = calls[-1].f_code.co_name if calls else found.call or "a thread"
            line = _shown(ours) if ours and (collective or not found.line) else found.line
            found = Beat(number, call, line, collective or found.collective, found.count)
    return found


def _count() -> int:
    if not dist.is_initialized() or dist.group.WORLD is None:
        return 0
    return int(dist.group.WORLD._get_sequence_number_for_group())  # type: ignore[attr-defined]


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames, from the innermost outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_OURS)


def _of_torch(frame: FrameType) -> bool:
    return frame.f_code.co_filename.endswith(_COLLECTIVES) and not frame.f_code.co_name.startswith("_")


def _shown(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename).relative_to(_PACKAGES)
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
