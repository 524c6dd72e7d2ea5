"""A sum by levels, inside hosts and between them, has the bits of the tree over all ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from kernels.collectives import TreeGroup
from kernels.collectives.levels import Levels, by_levels, together
from tests.bits import assert_same_bits
from tests.collectives.processes import run_ranks
from tests.collectives.test_collectives import tree

WORLD = 4
N = 37  # elements that each rank ends with


def parts(rank: int) -> torch.Tensor:
    """Values over many exponents, so that another order has other bits."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(WORLD * N, generator=generator)
    return x * torch.exp2(torch.randint(-12, 12, x.shape, generator=generator).float())


def work() -> dict[Any, Any]:
    out: dict[Any, Any] = {}
    world = dist.group.WORLD
    assert world is not None
    mine = parts(dist.get_rank())
    out["one host"] = by_levels(world)  # over gloo nothing serves better than its collectives
    for block in (1, 2, 4):
        group = TreeGroup(world, Levels(world, block))
        scattered = torch.full((N,), float("nan"))
        group.reduce_scatter(scattered, mine)
        out[block] = scattered, group.all_reduce(mine, torch.bfloat16), group.all_gather(mine)
    return out


def test_every_cut_into_hosts_is_one_tree() -> None:
    ranks = run_ranks(WORLD, work)
    root = tree([parts(r) for r in range(WORLD)])
    backwards = tree([parts(r) for r in (0, 2, 1, 3)])
    assert not torch.equal(root, backwards), "these values show no order"
    for rank, found in enumerate(ranks):
        assert found["one host"] is None
        for block in (1, 2, 4):
            scattered, reduced, gathered = found[block]
            assert_same_bits(scattered, root[rank * N : (rank + 1) * N])
            assert_same_bits(reduced, root.to(torch.bfloat16))
            assert_same_bits(gathered, torch.stack([parts(r) for r in range(WORLD)]))


@pytest.mark.parametrize(
    ("hosts", "block"),
    [("aaaa", 4), ("aabb", 2), ("aaab", 1), ("abab", 1), ("aabbcccc", 2), ("aaaabbbb", 4), ("a", 1), ("aaaaaaab", 1)],
)
def test_ranks_of_a_host_that_are_a_subtree(hosts: str, block: int) -> None:
    assert together(hosts) == block


@given(st.integers(0, 4).flatmap(lambda n: st.lists(st.sampled_from("abc"), min_size=1 << n, max_size=1 << n)))
def test_a_block_is_never_of_two_hosts(hosts: list[str]) -> None:
    block = together(hosts)
    assert len(hosts) % block == 0
    assert all(len(set(hosts[i : i + block])) == 1 for i in range(0, len(hosts), block))
