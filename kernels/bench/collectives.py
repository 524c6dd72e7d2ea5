"""python -m kernels.collectives.bench: the tree collectives beside NCCL's own, one card per rank, inside a CUDA graph.

A sum whose bits are not those of the fold on one rank is not timed. NCCL's all-reduce is in bfloat16, as others serve; ours
adds float32 and rounds once. NCCL's reduce-scatter is in float32, as FSDP has it.
"""

import json
import operator
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from kernels.collectives import TreeGroup, reduce_scatter
from kernels.collectives.rendezvous import address_of, connect, listen
from kernels.host.command import Parser
from kernels.tree import fold

HIDDEN = 4096
ROWS = (1, 16, 64, 256, 1024, 8192)
PARTS = (1 << 15, 1 << 19, 1 << 22, 1 << 24)
SAMPLES = 9


def microseconds(call: Callable[[], object], calls: int) -> float:
    """Median time of one of `calls` calls in a replayed graph. Every rank must measure the same call."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(SAMPLES + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    dist.barrier()
    times = [events[i].elapsed_time(events[i + 1]) for i in range(SAMPLES)]
    return statistics.median(times) * 1e3 / calls


def inputs(n: int) -> list[torch.Tensor]:
    """float32 [n] of every rank, the same on every card."""
    random = [torch.Generator("cuda").manual_seed(rank) for rank in range(dist.get_world_size())]
    return [torch.empty(n, device="cuda").normal_(generator=g) for g in random]


def require(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if not torch.equal(got.view(torch.uint8), expected.view(torch.uint8)):
        raise SystemExit(f"{what} on rank {dist.get_rank()} has not the bits of the fold; it is not timed")


def rows() -> list[dict[str, Any]]:
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
        row["NCCL"] = microseconds(lambda t=rounded: dist.all_reduce(t), calls)
        for name, group in ours.items():
            require(group.all_reduce(x[rank], torch.bfloat16), fold(x, operator.add).bfloat16(), f"all_reduce {name}")
            row[name] = microseconds(lambda g=group, t=x[rank]: g.all_reduce(t, torch.bfloat16), calls)
        out.append(row)
    for n in PARTS:
        x = inputs(world.size() * n)
        output = torch.empty(n, device="cuda")
        row = {"sum": "reduce_scatter, fp32", "n": f"{world.size()} x {n}"}
        row["NCCL"] = microseconds(lambda o=output, t=x[rank]: dist.reduce_scatter_tensor(o, t), 8)
        for name, by in {"peers": peers, "over NCCL": None}.items():
            reduce_scatter(output, x[rank], world, by)
            root = fold([part.view(world.size(), n)[rank] for part in x], operator.add)
            require(output, root, f"reduce_scatter {name}")
            row[name] = microseconds(lambda o=output, t=x[rank], p=by: reduce_scatter(o, t, world, p), 8)
        out.append(row)
    return out


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"us in a CUDA graph, {dist.get_world_size()} x {torch.cuda.get_device_name()}")
    for column in ("sum", "n", "NCCL", "peers", "ratio", "over NCCL", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        ratios = {name: f"{row['NCCL'] / row[name]:.2f}" for name in ("peers", "over NCCL")}
        times = {name: f"{row[name]:.1f}" for name in ("NCCL", *ratios)}
        cells = [times["NCCL"], times["peers"], ratios["peers"], times["over NCCL"], ratios["over NCCL"]]
        table.add_row(row["sum"], row["n"], *cells)
    Console(width=110).print(table)


def run(rank: int, world: int, address: str, path: str | None) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", store=connect(address), rank=rank, world_size=world, device_id=device)
    measured = rows()
    if rank == 0:
        show(measured)
        if path:
            report = {"device": torch.cuda.get_device_name(), "ranks": world, "torch": torch.__version__}
            Path(path).write_text(json.dumps(report | {"rows": measured}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="a power of two; one card each")
    parser.add_argument("--json", help="write the rows to this file")
    arguments = parser.parse_args()
    if torch.cuda.device_count() < arguments.ranks:
        parser.error(f"{arguments.ranks} ranks need a card each, and there are {torch.cuda.device_count()}")
    store = listen()
    mp.spawn(run, (arguments.ranks, address_of(store), arguments.json), arguments.ranks)


if __name__ == "__main__":
    main()
