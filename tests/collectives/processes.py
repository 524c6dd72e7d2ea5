"""Real ranks: one process each, gloo or NCCL over a TCP store on a port that the system picks."""

import multiprocessing
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kernels.collectives.rendezvous import address_of, connect, listen
from kernels.gpu.card import choose_family, chosen_family

PATIENCE = timedelta(seconds=60)
START = "forkserver" if sys.platform == "linux" else "spawn"
if START == "forkserver":  # imports torch once for all ranks of a session, in a process that has started no thread yet
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed.fsdp", "kernels.weights.files"])


def run_ranks(
    world: int, work: Callable[..., Any], *args: Any, backend: str = "gloo", seconds: float = 600
) -> list[Any]:
    """What `work(*args)` returns on each of `world` ranks, in rank order. `work` must be importable by name. Over NCCL, rank r
    has card r. Ranks that have not finished after `seconds` are killed: some wait for others on a GPU."""
    store = listen()
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            _rank,
            (world, address_of(store), folder, backend, chosen_family(), work, args),
            nprocs=world,
            join=False,
            start_method=START,
        )
        until = time.monotonic() + seconds
        while not ranks.join(timeout=1):
            if time.monotonic() > until:
                for process in ranks.processes:
                    process.kill()
                raise TimeoutError(f"{work.__name__} on {world} ranks over {backend} did not finish in {seconds} s")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world)]


def _rank(
    rank: int,
    world: int,
    address: str,
    folder: str,
    backend: str,
    family: str,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    choose_family(family)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = None
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store = connect(address)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE, device_id=device)
    try:
        Path(folder, str(rank)).write_bytes(pickle.dumps(work(*args)))
    finally:
        dist.destroy_process_group()
