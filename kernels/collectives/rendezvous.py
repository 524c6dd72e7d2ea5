"""Where ranks find each other: a store that listens from the moment its port is chosen, in the process that starts the ranks: a
port that is looked up, given back and named to a rank is another program's by then. It listens at one address: the loopback one
for the ranks of a host, else the one at which the others reach this node."""

import ipaddress
import os
import socket
from datetime import timedelta

import psutil
import torch.distributed as dist

from kernels.collectives.group import backend_of

LOOPBACK = "127.0.0.1"
PATIENCE = timedelta(seconds=120)
"""For the other ranks to arrive, and in a collective, where `join` is not told another."""
_ANSWER = 30.0  # seconds for the store to accept: it is there before any rank


class AddressError(RuntimeError):
    """Says that a network interface, or what is behind it, is not there."""


def listen(port: int = 0, host: str = LOOPBACK) -> dist.TCPStore:
    """Opens a store at `port` of address `host` alone, or at any free one; it answers for as long as it is kept. OSError where
    the port is in use."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also just after a run that had it
        listener.bind((host, port))
        port = listener.getsockname()[1]
        return dist.TCPStore(host, port, None, True, PATIENCE, False, master_listen_fd=listener.detach())


def address_of(store: dist.TCPStore) -> str:
    """Returns tcp://host:port of a store."""
    return f"tcp://{store.host}:{store.port}"


def connect(address: str) -> dist.TCPStore:
    """Connects to the store at `address` (tcp://host:port), of this process or another. AddressError where nothing answers."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        socket.create_connection(
            (host, int(port)), timeout=_ANSWER
        ).close()  # the store's own client tries for two minutes
    except OSError as error:
        raise AddressError(
            f"the rendezvous at {host}:{port} does not answer from {socket.gethostname()} ({error}): open the ports between "
            f"the nodes, or name another network by cluster.interface"
        ) from None
    return dist.TCPStore(host, int(port), None, False, patience())


def interface_of(address: str) -> str:
    """Returns the name of the network interface of this host that has `address`. AddressError where none has."""
    found = {name: [a.address for a in all_] for name, all_ in _interfaces().items()}
    for name, addresses in found.items():
        if address in addresses:
            return name
    raise AddressError(
        f"{socket.gethostname()} has no network interface with the address {address}: it has {_shown(found)}"
    )


def address_on(interface: str) -> str:
    """Returns the IPv4 address of a network interface of this host. AddressError where it has none."""
    found = {name: [a.address for a in all_ if a.family == socket.AF_INET] for name, all_ in _interfaces().items()}
    if addresses := found.get(interface):
        return addresses[0]
    raise AddressError(
        f"cluster.interface={interface}: {socket.gethostname()} has no such network interface with an IPv4 address: it has "
        f"{_shown({name: some for name, some in found.items() if some})}"
    )


def _interfaces() -> dict[str, list]:
    return psutil.net_if_addrs()


def _shown(found: dict[str, list[str]]) -> str:
    return ", ".join(f"{name} ({' '.join(addresses)})" for name, addresses in found.items())


def talk_over(interface: str) -> None:
    """Makes the groups that this process makes from here on connect over one network interface: else gloo takes what the host's
    own name stands for, which may be an address that no other host reaches, and NCCL guesses."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    if not ipaddress.ip_address(address_on(interface)).is_loopback:
        os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"  # exactly this one, and none that begins like it


def choose_network(address: str, interface: str | None = None) -> None:
    """Chooses what the groups that this process makes from here on connect over: a network `interface`, or the one towards the
    store at `address`."""
    talk_over(interface or interface_of(_toward(address)))


_patience = [PATIENCE]  # of this process's groups


def patience() -> timedelta:
    """Returns how long this process waits for other ranks in a collective."""
    return _patience[0]


def join(
    address: str,
    device: str,
    rank: int,
    size: int,
    cards: int | None = None,
    interface: str | None = None,
    seconds: float | None = None,
) -> dist.ProcessGroup:
    """Makes this process's default group: rank `rank` of the `size` that meet at `address`. A collective. `cards`: of all
    ranks together, which are on several hosts (None: on this one). `interface`: to talk over; None: the one of the network on
    which `address` is. `seconds`: for the others to arrive, and in every collective from here on, of any group that this
    process makes; None: PATIENCE."""
    _patience[0] = PATIENCE if seconds is None else timedelta(seconds=seconds)
    choose_network(address, interface)
    backend = backend_of(device, size, cards)
    dist.init_process_group(backend, store=connect(address), rank=rank, world_size=size, timeout=patience())
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _toward(address: str) -> str:
    """The address of this host from which it would reach a store."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent: it asks the host's routes
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])
