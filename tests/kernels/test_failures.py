"""Failures as torch says them, and as they arrive in another process: by their type."""

import errno
import os
import pickle

import pytest
import torch
import torch.distributed as dist

from kernels.host.failures import OutOfMemory, RankLost, typed, with_typed_failures

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 512.00 MiB is free. "
    "Including non-PyTorch memory, this process has 78.60 GiB memory in use."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes. "
    "Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "asked", "free"),
    [
        (torch.OutOfMemoryError(CUDA), 2 << 30, 512 << 20),
        (RuntimeError(CPU), 8 << 30, 0),
        (MemoryError(), 0, 0),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), 0, 0),
        (RuntimeError("not enough memory: 4096 bytes of host memory could not be pinned (CUDA error 2)"), 0, 0),
    ],
)
def test_an_allocation(error: Exception, asked: int, free: int) -> None:
    found = typed(error)
    assert isinstance(found, OutOfMemory) and (found.asked, found.free) == (asked, free)
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again, OutOfMemory) and (again.asked, again.free) == (asked, free)


def test_what_torch_says_today() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50)
    found = typed(error.value)
    assert isinstance(found, OutOfMemory) and found.asked == 4 << 50


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234"),
        RuntimeError("NCCL Error 6: remote process exited"),
        dist.DistBackendError("wait timeout"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("another card has not answered for 20 s"),
    ],
)
def test_a_rank_that_left(error: Exception) -> None:
    assert isinstance(pickle.loads(pickle.dumps(typed(error))), RankLost)


@pytest.mark.parametrize(
    "error", [ValueError("the memory of this test"), ValueError("gloo"), KeyError("out of memory")]
)
def test_others_stay_what_they_are(error: Exception) -> None:
    assert typed(error) is None


class Base:
    def inherited(self) -> None:
        raise torch.OutOfMemoryError(CUDA)


@with_typed_failures
class Actor(Base):
    def own(self, error: Exception) -> None:
        raise error

    def fine(self, *, x: int) -> int:
        return x


def test_methods_of_an_actor() -> None:
    with pytest.raises(OutOfMemory):
        Actor().inherited()
    with pytest.raises(RankLost, match="gloo"):
        Actor().own(RuntimeError("gloo: gone"))
    with pytest.raises(KeyError):
        Actor().own(KeyError("x"))
    with pytest.raises(torch.OutOfMemoryError):
        Base().inherited()
    assert Actor().fine(x=3) == 3
