"""What one rank does on its own card: it knows every rank's input, adds them itself, and returns what differs."""

import random
from collections.abc import Callable

import torch
import torch.distributed as dist

from kernels.collectives import TreeGroup
from kernels.collectives.peers import PeerError, PeerMemory
from kernels.tree import TreeError

SIZES = [1, 3, 16, 17, 1000, 4096, 4097, 65_536, 65_537, 262_144, 1 << 20, (1 << 20) + 1, 5_000_000, 16 << 20]
REPLAYED = [(1, torch.bfloat16), (4096, torch.bfloat16), (65_536, torch.float32), (262_144, torch.bfloat16)]
REPLAYED += [(1 << 20, torch.bfloat16), (999_999, torch.float32), (6_000_000, torch.bfloat16)]
SCATTERED = [5, 4096, 3_000_000]
REPLAYS = 100


def tree(nodes: list[torch.Tensor]) -> torch.Tensor:
    """Written out, so that `fold` is not its own judge."""
    while len(nodes) > 1:
        nodes = [a + b for a, b in zip(nodes[::2], nodes[1::2], strict=True)]
    return nodes[0]


def inputs(seed: int, n: int, into: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
    """float32 [n] of every rank, the same on every card, over a wide range of exponents."""
    random_ = torch.Generator("cuda")
    out = []
    for rank in range(dist.get_world_size()):
        random_.manual_seed(1000 * seed + rank)
        x = torch.empty(n, device="cuda").normal_(generator=random_)
        x = x * torch.exp2(torch.empty(n, device="cuda").uniform_(-20, 20, generator=random_).round())
        out.append(x if into is None else into[rank].copy_(x))
    return out


def differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype} {a.shape} against {b.dtype} {b.shape}"
    return (a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum()


def eager(group: TreeGroup) -> list[str]:
    rank, size, wrong = group.shard.rank, group.shard.size, []

    def check(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        if bytes_ := int(differing(got, expected)):
            wrong.append(f"{what}: {bytes_} bytes of {got.nbytes} on rank {rank}")

    for n in SIZES:
        x = inputs(n, n)
        for dtype in (torch.bfloat16, torch.float32):
            check(f"all_reduce {n} {dtype}", group.all_reduce(x[rank], dtype), tree(x).to(dtype))
            check(f"all_gather {n} {dtype}", group.all_gather(x[rank].to(dtype)), torch.stack(x).to(dtype))
        if n % size == 0:
            output = torch.empty(n // size, device="cuda")
            group.reduce_scatter(output, x[rank])
            check(f"reduce_scatter {n}", output, tree([part.view(size, -1)[rank] for part in x]))
    ids = torch.arange(size * 6, device="cuda").view(size, 3, 2) << 40
    check("all_gather of int64", group.all_gather(ids[rank]), ids)
    strided = torch.stack([x[rank], x[rank]], 1)[:, 0]
    check("all_reduce of a stride", group.all_reduce(strided, torch.float32), tree(x))
    assert group.all_reduce(torch.empty(0, 4, device="cuda"), torch.bfloat16).shape == (0, 4)
    return wrong


def replayed(group: TreeGroup) -> list[str]:
    """One graph of calls of every kind and size, replayed with new inputs, late ranks and eager calls in between."""
    rank, size, late = group.shard.rank, group.shard.size, random.Random(group.shard.rank)
    sums = [[torch.empty(n, device="cuda") for _ in range(size)] for n, _ in REPLAYED]
    parts = [[torch.empty(size * n, device="cuda") for _ in range(size)] for n in SCATTERED]
    scattered = [torch.empty(n, device="cuda") for n in SCATTERED]

    def calls() -> list[torch.Tensor]:
        out = [group.all_reduce(x[rank], dtype) for x, (_, dtype) in zip(sums, REPLAYED, strict=True)]
        out += [group.all_gather(x[rank]) for x in sums]
        for x, output in zip(parts, scattered, strict=True):
            group.reduce_scatter(output, x[rank])
        return out

    for i, x in enumerate(sums + parts):
        inputs(i, x[0].numel(), x)
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = calls()
    wrong = torch.zeros(2 * len(REPLAYED) + len(SCATTERED) + 1, dtype=torch.int64, device="cuda")
    for i in range(REPLAYS):
        for j, x in enumerate(sums + parts):
            inputs(64 * i + j, x[0].numel(), x)
        if late.random() < 0.5:
            torch.cuda._sleep(late.randrange(3_000_000))
        graph.replay()
        expected = [tree(x).to(dtype) for x, (_, dtype) in zip(sums, REPLAYED, strict=True)]
        expected += [torch.stack(x) for x in sums]
        for k, (got, want) in enumerate(zip(results, expected, strict=True)):
            wrong[k] += differing(got, want)
        for k, (x, output, n) in enumerate(zip(parts, scattered, SCATTERED, strict=True)):
            wrong[len(expected) + k] += differing(output, tree([part.view(size, n)[rank] for part in x]))
        x = sums[i % len(sums)]
        if late.random() < 0.3:
            torch.cuda._sleep(late.randrange(300_000))
        wrong[-1] += differing(group.all_reduce(x[rank], torch.bfloat16), tree(x).bfloat16())
    return [f"call {k} on rank {rank}: {count} bytes" for k, count in enumerate(wrong.tolist()) if count]


def error_of(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (PeerError, TreeError) as error:
        return str(error)
    return "no error"


def errors(group: TreeGroup, peers: PeerMemory) -> dict[str, str]:
    half = torch.ones(4, device="cuda", dtype=torch.bfloat16)
    alone = [dist.new_group([rank]) for rank in range(group.shard.size)][group.shard.rank]
    return {
        "bf16 partials": error_of(lambda: group.all_reduce(half, torch.bfloat16)),
        "a CPU tensor": error_of(lambda: group.all_reduce(torch.ones(4), torch.bfloat16)),
        "sizes": error_of(lambda: peers.reduce_scatter(torch.ones(3, device="cuda"), torch.ones(7, device="cuda"))),
        "to float64": error_of(lambda: peers.all_reduce(torch.ones(4, device="cuda"), torch.float64)),
        "another group": error_of(lambda: TreeGroup(alone, peers)),
    }


def work(replay: bool = True) -> dict:
    """{name: what was wrong}, and {"errors": message of each wrong use}."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    peers = PeerMemory(dist.group.WORLD)
    out: dict = {}
    for name, group in {"nccl": TreeGroup(dist.group.WORLD), "peers": TreeGroup(dist.group.WORLD, peers)}.items():
        out[name, "eager"] = eager(group)
        if replay:
            out[name, "replayed"] = replayed(group)
    out["errors"] = errors(group, peers)
    torch.cuda.synchronize()
    dist.barrier()  # nobody unmaps its memory while others write there
    return out
