"""What a rank tells of where it is, and at which address it is found."""

import os
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from kernels.collectives.heartbeat import Beat, Heard, Heartbeat, where
from kernels.collectives.rendezvous import (
    LOOPBACK,
    AddressError,
    address_of,
    address_on,
    choose_network,
    connect,
    interface_of,
    listen,
)


def test_a_rank_is_heard_while_it_lives() -> None:
    store = listen()
    heard = Heard(store, ["trainer rank 0", "trainer rank 1"])
    assert heard.beats() == {}
    beating = Heartbeat("trainer rank 1", address_of(store))
    until = time.monotonic() + 60
    while not (found := heard.beats()) or found["trainer rank 1"].number < 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    beating.stop()
    assert set(found) == {"trainer rank 1"}
    assert str(found["trainer rank 1"]) == "waited for a call"


def test_a_beat_says_in_which_call_and_collective(tmp_path: Path) -> None:
    """By the stacks of threads, here of one that looks like an actor's which waits in a collective of torch."""
    import kernels.collectives.heartbeat as module

    waits = threading.Event()
    scope: dict = {"waits": waits}
    root = Path(module.__file__).resolve().parents[2]
    files = {"torch/distributed/distributed_c10d.py": "def all_gather_single():\n    waits.wait()\n"}
    files[str(root / "trainer/loss.py")] = "\n\ndef add():\n    all_gather_single()\n"
    files[str(root / "trainer/actor.py")] = "def step():\n    add()\n"
    for name, text in files.items():
        exec(compile(text, name, "exec"), scope)
    thread = threading.Thread(target=scope["step"])
    thread.start()
    try:
        until = time.monotonic() + 30
        while not (found := where(7)).collective:
            assert time.monotonic() < until
    finally:
        waits.set()
        thread.join()
    assert found == Beat(7, "step", "trainer/loss.py:4 add", "all_gather_single")
    assert str(found) == "was in step at trainer/loss.py:4 add, waiting in all_gather_single (number 0)"


def test_an_interface_is_found_by_its_address_and_named_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    name = interface_of(LOOPBACK)
    assert address_on(name) == LOOPBACK
    with pytest.raises(
        AddressError, match=rf"no network interface with the address 203.0.113.7: it has .*{name} \({LOOPBACK}"
    ):
        interface_of("203.0.113.7")
    with pytest.raises(AddressError, match=rf"^cluster.interface=none0: .* no such .*{name} \({LOOPBACK}"):
        address_on("none0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    choose_network(address_of(listen()))
    assert os.environ["GLOO_SOCKET_IFNAME"] == name and "NCCL_SOCKET_IFNAME" not in os.environ
    monkeypatch.undo()


@pytest.mark.skipif(not any(a.family == socket.AF_INET and a.address != LOOPBACK for all_ in psutil.net_if_addrs().values()
                            for a in all_), reason="needs a second address")  # fmt: skip
def test_a_store_listens_at_one_address_and_ranks_talk_over_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first interface that is not loopback stands for the network of a cluster."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "another")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "another")
    name, address = next(
        (name, a.address)
        for name, all_ in psutil.net_if_addrs().items()
        for a in all_
        if a.family == socket.AF_INET and a.address != LOOPBACK
    )
    store = listen(0, address)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, store.port), timeout=5)
    choose_network(address_of(store))
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (name, f"={name}")


def test_nobody_at_the_rendezvous_is_told_at_once() -> None:
    with socket.create_server((LOOPBACK, 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        AddressError, match=rf"^the rendezvous at {LOOPBACK}:{port} does not answer from .*cluster.interface"
    ):
        connect(f"tcp://{LOOPBACK}:{port}")
