"""python -m kernels.collectives.bench: the tree collectives beside NCCL's own, one card per rank, inside a CUDA graph.

A sum whose bits are not those of the fold on one rank is not timed. NCCL's all-reduce is in bfloat16, as others serve; ours
adds float32 and rounds once. NCCL's reduce-scatter is in float32, as FSDP has it.
"""

import operator
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kernels.bench.table import console, show
from kernels.bench.timer import Call, recorded, samples
from kernels.collectives import TreeGroup
from kernels.collectives.rendezvous import address_of, connect, listen
from kernels.contract import same_bits
from kernels.host.command import Parser, count, output, write_json
from kernels.tree import fold

HIDDEN = 4096
ROWS = (1, 16, 64, 256, 1024, 8192)
PARTS = (1 << 15, 1 << 19, 1 << 22, 1 << 24)
SAMPLES = 9


def microseconds(call: Call, calls: int) -> float:
    """Returns the median time of one of `calls` calls in a replayed graph. Every rank must measure the same call."""
    replay = recorded([call] * calls)
    dist.barrier()
    seconds = samples(replay, SAMPLES, on_gpu=True)
    dist.barrier()
    return statistics.median(seconds) * 1e6 / calls


def inputs(n: int) -> list[torch.Tensor]:
    """Draws float32 [n] of every rank, the same on every card."""
    random = [torch.Generator("cuda").manual_seed(rank) for rank in range(dist.get_world_size())]
    return [torch.empty(n, device="cuda").normal_(generator=g) for g in random]


def require(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Ends the process unless a sum has the bits of the fold."""
    if not same_bits(got, expected):
        raise SystemExit(f"{what} on rank {dist.get_rank()} has not the bits of the fold; it is not timed")


def rows() -> list[dict[str, Any]]:
    """Measures every sum on this rank."""
    from kernels.collectives.peers import PeerMemory  # triton, which a machine without a GPU may lack

    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    peers = PeerMemory(world)
    ours = {"peers": TreeGroup(world, peers), "over NCCL": TreeGroup(world)}
    out = []
    for m in ROWS:
        x = inputs(m * HIDDEN)
        rounded = x[rank].bfloat16()
        calls = 20 if m <= 256 else 4
        row: dict[str, Any] = {"sum": "all_reduce, bf16", "n": f"{m} x {HIDDEN}"}
        row["NCCL"] = microseconds(partial(dist.all_reduce, rounded), calls)
        for name, group in ours.items():
            require(group.all_reduce(x[rank], torch.bfloat16), fold(x, operator.add).bfloat16(), f"all_reduce {name}")
            row[name] = microseconds(partial(group.all_reduce, x[rank], torch.bfloat16), calls)
        out.append(row)
    for n in PARTS:
        x = inputs(world.size() * n)
        mine = torch.empty(n, device="cuda")
        row = {"sum": "reduce_scatter, fp32", "n": f"{world.size()} x {n}"}
        row["NCCL"] = microseconds(partial(dist.reduce_scatter_tensor, mine, x[rank]), 8)
        for name, group in ours.items():
            group.reduce_scatter(mine, x[rank])
            root = fold([part.view(world.size(), n)[rank] for part in x], operator.add)
            require(mine, root, f"reduce_scatter {name}")
            row[name] = microseconds(partial(group.reduce_scatter, mine, x[rank]), 8)
        out.append(row)
    return out


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints a line for each size of each sum: microseconds of NCCL and of ours, and their ratio."""
    cells = []
    for row in rows:
        sides = [(f"{row[name]:.1f}", f"x{row['NCCL'] / row[name]:.2f}") for name in ("peers", "over NCCL")]
        cells.append((row["sum"], row["n"], f"{row['NCCL']:.1f}", *sides))
    title = f"us in a CUDA graph, and NCCL's over ours, {dist.get_world_size()} x {torch.cuda.get_device_name()}"
    show(console(), ("sum", "n"), ("NCCL", "peers", "over NCCL"), cells, title)


def run(rank: int, world: int, address: str, path: Path | None) -> None:
    """Measures as one rank; the first prints and writes the rows."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", store=connect(address), rank=rank, world_size=world, device_id=device)
    measured = rows()
    if rank == 0:
        print_table(measured)
        where = {"device": torch.cuda.get_device_name(), "ranks": world, "torch": torch.__version__}
        write_json(path, where | {"rows": measured})
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Starts a process for each rank."""
    parser = Parser(description=__doc__)
    parser.add_argument("--ranks", type=count, default=2, help="a power of two; one card each")
    parser.add_argument("--json", type=output, help="write the rows to this file")
    arguments = parser.parse_args()
    if torch.cuda.device_count() < arguments.ranks:
        parser.error(f"{arguments.ranks} ranks need a card each, and there are {torch.cuda.device_count()}")
    parser.require("cuda")
    store = listen()
    mp.spawn(run, (arguments.ranks, address_of(store), arguments.json), arguments.ranks)
