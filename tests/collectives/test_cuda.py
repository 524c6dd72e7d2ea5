"""One card: the fold kernel, several gloo ranks with CUDA tensors, and what peer memory refuses."""

import pytest
import torch
import torch.distributed as dist

from kernels.collectives import TreeGroup
from kernels.tree import fold
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
        group.reduce_scatter(scattered, torch.stack([mine * 2.0**r for r in range(world)]))
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
