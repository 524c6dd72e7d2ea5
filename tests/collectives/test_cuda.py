"""One card: the fold kernel, several gloo ranks with CUDA tensors, and the peer-memory kernels with streams for ranks."""

import random

import pytest
import torch
import torch.distributed as dist

from kernels.collectives import TreeGroup, reduce_scatter
from kernels.tree import Shard, fold
from tests.bits import assert_same_bits
from tests.collectives.processes import run_ranks
from tests.collectives.ranks import wild

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_the_fold_kernel_is_fold(count: int, dtype: torch.dtype) -> None:
    from kernels.collectives.fold_kernel import fold_rows

    for n in (1, 5, 4096, 100_003):
        parts = wild(count + n, (count, n))
        parts[:, 0] = torch.inf
        out = torch.empty(n, dtype=dtype, device="cuda")
        fold_rows(parts.cuda(), out)
        assert_same_bits(out, fold(list(parts), torch.add).to(dtype), f"{count} rows of {n}")


def on_one_card() -> list[torch.Tensor]:
    torch.cuda.set_device(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    group, out = TreeGroup(dist.group.WORLD), []
    for shape in [(1,), (3, 5), (1000, 257)]:
        mine = wild(rank, shape).cuda()
        scattered = torch.empty(shape, device="cuda")
        reduce_scatter(scattered, torch.stack([mine * 2.0**r for r in range(world)]), dist.group.WORLD)
        results = [
            group.all_reduce(mine, torch.bfloat16),
            group.all_reduce(mine, torch.float32),
            group.all_gather(mine),
        ]
        out += [r.cpu() for r in (*results, scattered)]
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_gloo_ranks_share_a_card(world: int) -> None:
    for rank, got in enumerate(run_ranks(world, on_one_card)):
        expected = []
        for shape in [(1,), (3, 5), (1000, 257)]:
            x = [wild(r, shape) for r in range(world)]
            root = x[0] + x[1] if world == 2 else (x[0] + x[1]) + (x[2] + x[3])
            expected += [root.bfloat16(), root, torch.stack(x), root * 2.0**rank]
        assert_same_bits(got, expected, f"rank {rank} of {world}")


def refused() -> str:
    from kernels.collectives.peers import PeerError, PeerMemory

    torch.cuda.set_device(0)
    try:
        PeerMemory(dist.group.WORLD)
    except PeerError as error:
        return str(error)
    return "no error"


def test_peer_memory_refuses_two_ranks_on_one_card() -> None:
    for message in run_ranks(2, refused):
        assert "ranks 0 and 1 share the card" in message and "gloo" in message


def streams(size: int, count: int, rounds: int) -> list[str]:
    """`count` random calls by `size` ranks that are streams of one card; what was wrong."""
    from kernels.collectives import peers as p

    card, draw, wrong = torch.device("cuda", 0), random.Random(size), []
    areas = p.Areas(size)
    boxes, _, _, flags, end = areas.offsets()

    def memories(tag: int, flag: int) -> list[p.PeerMemory]:
        memory = [torch.full((end,), 0xFF, dtype=torch.uint8, device=card) for _ in range(size)]  # NaN
        for m in memory:
            m[boxes : boxes + 2 * size * areas.capacity * 8].view(torch.int64).fill_(tag)
            m[flags:].view(torch.int32).fill_(flag)
        addresses = [m.data_ptr() for m in memory]
        return [p.PeerMemory.of(Shard(r, size), memory[r], addresses) for r in range(size)]

    # Few kernels, and odd sizes alone: each is compiled for every rank, and again for sizes that 16 divides.
    kernels = [
        (p.REDUCE, torch.bfloat16, 8191, p.Launch(True, 512, 4)),
        (p.GATHER, torch.bfloat16, 8191, p.Launch(True, 512, 4)),
        (p.REDUCE, torch.bfloat16, 499_999, p.Launch(False, 512, 4, 8, 1)),
        (p.REDUCE, torch.float32, 499_999, p.Launch(False, 512, 4, 8, 2)),
        (p.REDUCE, torch.bfloat16, 499_999, p.Launch(False, 512, 4, 2, 1, whole=True)),
        (p.SCATTER, torch.float32, 499_999, p.Launch(False, 512, 4, 8, 2)),
        (p.GATHER, torch.float32, 499_999, p.Launch(False, 512, 4, 2, 1)),
    ]
    calls = []
    for _ in range(count):
        kind, dtype, most, how = draw.choice(kernels)
        n = min(most, draw.choice([7, 1001, 4097, 30_001, 499_999]))
        x = [torch.randn(size * n if kind == p.SCATTER else n, device=card) for _ in range(size)]
        if kind == p.REDUCE:
            expected = [fold(x, torch.add).to(dtype)] * size
        elif kind == p.SCATTER:
            expected = [fold([part.view(size, n)[r] for part in x], torch.add) for r in range(size)]
        else:
            x = [part.to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16) for part in x]
            expected = [torch.cat(x)] * size
        out = [torch.empty_like(e) for e in expected]
        calls.append((kind, n, how, x, out, expected))
    # A kernel that is loaded while others wait for it never runs: first run each alone, over memory in which all has come.
    for kind, n, how, x, out, _ in calls:
        for r, memory in enumerate(memories(1 << 32, 1 << 30)):
            memory.launch(kind, x[r], out[r], n, how)
        torch.cuda.synchronize()
    ranks, queues = memories(0, 0), [torch.cuda.Stream() for _ in range(size)]
    for i in range(rounds):
        for _, _, _, _, out, _ in calls:
            for o in out:
                o.view(torch.uint8).fill_(0xFF)
        torch.cuda.synchronize()
        for kind, n, how, x, out, _ in calls:
            for r in draw.sample(range(size), size):
                with torch.cuda.stream(queues[r]):
                    if draw.random() < 0.3:
                        torch.cuda._sleep(draw.randrange(200_000))
                    ranks[r].launch(kind, x[r], out[r], n, how)
        torch.cuda.synchronize()
        for kind, n, how, _, out, expected in calls:
            for r in range(size):
                different = int((out[r].view(torch.uint8) != expected[r].view(torch.uint8)).sum())
                if different:
                    wrong.append(f"round {i} rank {r} of {size}: {different} bytes, kind {kind} n {n} {how}")
    return wrong


@pytest.mark.parametrize("size", [2, 4])
def test_peer_kernels_with_streams_for_ranks(size: int) -> None:
    assert run_ranks(1, streams, size, 24, 6, seconds=150) == [[]]
