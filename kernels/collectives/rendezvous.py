"""Where the ranks of a host find each other: a store on a loopback port, which listens from the moment its port is
chosen, in the process that starts the ranks: a port that is looked up, given back and named to a rank is another
program's by then."""

import socket
from datetime import timedelta

import torch.distributed as dist

from kernels.collectives.group import backend_of

HOST = "127.0.0.1"
PATIENCE = timedelta(seconds=120)  # for the other ranks to arrive


def listen(port: int = 0) -> dist.TCPStore:
    """Opens a store at `port`, or at any free one; it answers for as long as it is kept. OSError where the port is in use."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # also just after a run that had it
        listener.bind((HOST, port))
        port = listener.getsockname()[1]
        return dist.TCPStore(HOST, port, None, True, PATIENCE, False, master_listen_fd=listener.detach())


def address_of(store: dist.TCPStore) -> str:
    """Returns tcp://host:port of a store."""
    return f"tcp://{store.host}:{store.port}"


def connect(address: str) -> dist.TCPStore:
    """Connects to the store at `address` (tcp://host:port), of this process or another."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    return dist.TCPStore(host, int(port), None, False, PATIENCE)


def join(address: str, device: str, rank: int, size: int) -> dist.ProcessGroup:
    """Makes this process's default group: rank `rank` of the `size` that meet at `address`. A collective."""
    dist.init_process_group(
        backend_of(device, size), store=connect(address), rank=rank, world_size=size, timeout=PATIENCE
    )
    assert dist.group.WORLD is not None
    return dist.group.WORLD
