"""Bytes that another process reads: two halves, filled in turn while the other is read.

On a CPU a file in memory that both map; on a GPU memory of the card that the other process opens (CUDA IPC). Between cards
and between hosts bytes travel over `Wire`. Who may read when is up to the callers: a half is filled again only after all have
read it.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kernels.collectives.rendezvous import connect, patience
from kernels.host.place import Place

_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
_PREFIX = "samebit-"  # of a bucket's file there
_STALL = 20.0  # seconds for what is queued, after which the other end is taken to be gone


@dataclass(frozen=True)
class Ticket:
    """Lets another process open a bucket."""

    handle: bytes  # of CUDA IPC; empty on a CPU
    path: str  # of the file; "" on a GPU
    place: Place
    half: int  # bytes

    def open(self, here: Place) -> list[torch.Tensor]:
        """Returns the halves, uint8 [half] each, to a process whose tensors are `here`. On a GPU the process's current device
        must be its card."""
        if here != self.place:
            raise ValueError(f"a bucket on {self.place} was to be opened on {here}: only {self.place} has that memory")
        if self.place.card is None:
            return list(torch.from_file(self.path, shared=True, size=2 * self.half, dtype=torch.uint8).split(self.half))
        from kernels.gpu import driver

        return list(driver.attach(self.handle, 2 * self.half).split(self.half))


class SharedBucket:
    """Owns a bucket. `hide` once everybody has opened it: nothing is left behind then, however the process ends."""

    def __init__(self, half: int, place: Place) -> None:
        """`place`: of this process's tensors; a card is the current one."""
        self._path = ""
        self._held = -1
        if place.card is None:
            self._held, self._path = _held_file()
            os.truncate(self._path, 2 * half)
            self.ticket = Ticket(b"", self._path, place, half)
            self.halves = self.ticket.open(place)
        else:
            from kernels.gpu import driver

            memory, handle = driver.shared(2 * half)
            self.ticket = Ticket(handle, "", place, half)
            self.halves = list(memory.split(half))

    def hide(self) -> None:
        """Unlinks the file, so that nobody else can open it; who maps it keeps it."""
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._held)
            self._path = ""

    def __del__(self) -> None:
        self.hide()


def _folder() -> Path:
    return _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())


def _held_file() -> tuple[int, str]:
    """A new file, and a handle that holds its lock: the system lets go of it when this process dies, however it does."""
    while True:
        handle, path = tempfile.mkstemp(prefix=_PREFIX, dir=_folder())
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, path
        os.close(handle)  # removed by another's `remove_leftovers`, before it was held


def remove_leftovers() -> list[tuple[str, int]]:
    """Removes the files of processes that were killed before they could `hide` them, of whatever user as far as the system
    allows it: (path, bytes) of each. One that a living process holds stays."""
    removed = []
    for path in sorted(_folder().glob(f"{_PREFIX}*")):
        with contextlib.suppress(OSError):  # another user's, held, or removed meanwhile
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = os.fstat(handle)
                if stat.S_ISREG(found.st_mode):
                    os.unlink(path)
                    removed.append((str(path), found.st_size))
            finally:
                os.close(handle)
    return removed


def wait_for_wires() -> None:
    """Waits until the device has done what is queued. TimeoutError where it waits for another card that does not
    answer: the wires are to be cut then."""
    queued = torch.cuda.Event()
    queued.record()
    deadline = time.monotonic() + _STALL
    while not queued.query():
        if time.monotonic() > deadline:
            raise TimeoutError(f"another card has not answered for {_STALL:.0f} s")
        time.sleep(1e-4)


class Wire:
    """Carries bytes from one process to another on another card or host: a process group of two ranks, NCCL between cards and
    gloo between the memory of hosts. Over NCCL sends and receives are queued on the device, in the order of the calls; the
    first waits for the other end to make its own."""

    def __init__(self, name: str, address: str, sender: bool, place: Place) -> None:
        """`name`: the same on both ends, and new. `address`: of a TCPStore that both reach (tcp://host:port). `place`: of this
        end's tensors. The network is the one that `rendezvous.choose_network` chose."""
        self._other = 1 if sender else 0
        store = dist.PrefixStore(name, connect(address))
        ends = (store, 1 - self._other, 2)
        if place.card is None:
            self._group: Any = dist.ProcessGroupGloo(*ends, timedelta(seconds=_STALL))
        else:
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = patience()
            self._group = dist.ProcessGroupNCCL(*ends, nccl)

    def send(self, x: torch.Tensor) -> dist.Work:
        """Sends `x`, which must stay as it is until the work is waited for."""
        work: dist.Work = self._group.send([x], self._other, 0)
        return work

    def receive(self, x: torch.Tensor) -> None:
        """Fills x with what the other rank sends, and waits for it."""
        self._group.recv([x], self._other, 0).wait()

    def cut(self) -> None:
        """Ends what the other end leaves unanswered."""
        self._group.abort()
