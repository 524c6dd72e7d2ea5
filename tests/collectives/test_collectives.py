"""Sums over 1, 2 and 4 real ranks have the bits of the unsharded tree, and every rank holds the same."""

import operator
from typing import Any

import pytest
import torch

from kernels.collectives import TreeGroup
from kernels.tree import TreeError, fold
from tests.bits import assert_same_bits
from tests.collectives.processes import run_ranks
from tests.collectives.ranks import DTYPES, SHAPES, WORLD, parts, work

SIZES = [1, 2, 4]


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return run_ranks(WORLD, work)


def members(rank: int, size: int) -> range:
    first = rank // size * size
    return range(first, first + size)


def tree(nodes: list[torch.Tensor]) -> torch.Tensor:
    """Written out, so that `fold` is not its own judge."""
    if len(nodes) == 4:
        return (nodes[0] + nodes[1]) + (nodes[2] + nodes[3])
    return nodes[0] + nodes[1] if len(nodes) == 2 else nodes[0]


@pytest.mark.parametrize("size", SIZES)
def test_all_gather_moves_bytes_in_rank_order(ranks: list, size: int) -> None:
    for rank in range(WORLD):
        assert ranks[rank][size]["shard"] == (rank % size, size)
        for shape, gathered in zip(SHAPES, ranks[rank][size]["gathered"], strict=True):
            assert_same_bits(gathered, torch.stack([parts(shape)[r] for r in members(rank, size)]))
        assert ranks[rank][size]["integers"].tolist() == [[[r, -r]] for r in members(rank, size)]


@pytest.mark.parametrize("size", SIZES)
def test_all_reduce_is_the_tree_rounded_once(ranks: list, size: int) -> None:
    for rank in range(WORLD):
        expected = []
        for shape in SHAPES:
            root = tree([parts(shape)[r] for r in members(rank, size)])
            expected += [root.to(dtype) for dtype in DTYPES] + [root]
        assert_same_bits(ranks[rank][size]["reduced"], expected, f"rank {rank} of groups of {size}")


@pytest.mark.parametrize("size", SIZES)
def test_reduce_scatter_is_the_tree_of_each_part(ranks: list, size: int) -> None:
    for rank in range(WORLD):
        for shape, scattered in zip(SHAPES, ranks[rank][size]["scattered"], strict=True):
            nodes = [parts(shape)[r] * 2.0 ** (rank % size) for r in members(rank, size)]
            assert_same_bits(scattered, tree(nodes), f"rank {rank} of groups of {size}, {shape}")


def test_the_values_tell_orders_apart() -> None:
    """Otherwise the tests above prove nothing: a chain, a reversal and a sum that rounds to bfloat16 all differ."""
    nodes = parts((1024,))
    root = tree(nodes)
    others = {
        "chain": ((nodes[0] + nodes[1]) + nodes[2]) + nodes[3],
        "pairs at distance 2": (nodes[0] + nodes[2]) + (nodes[1] + nodes[3]),
        "torch.sum": torch.stack(nodes).sum(0),
        "bf16 nodes": tree([n.bfloat16() for n in nodes]).float(),
    }
    for name, other in others.items():
        assert (other != root).sum() > 20, name
    assert (tree(nodes).bfloat16() != tree([n.bfloat16() for n in nodes])).sum() > 20


def test_a_subtree_per_rank_is_the_whole_tree(ranks: list) -> None:
    """Eight leaves: each of 4 ranks adds its two first. That is the tree of eight."""
    leaves = [leaf for shape in [(1024,)] for half in (1, -3) for leaf in (n * half for n in parts(shape))]
    roots = [leaves[2 * r] + leaves[2 * r + 1] for r in range(4)]
    assert_same_bits(tree(roots), fold(leaves, operator.add))


@pytest.mark.parametrize("size", SIZES)
def test_partials_must_be_unrounded(ranks: list, size: int) -> None:
    for rank in range(WORLD):
        errors = ranks[rank]["errors"]
        assert "takes unrounded float32 roots, got torch.bfloat16" in errors[f"bf16 all_reduce over {size}"]
        assert "torch.bfloat16" in errors[f"bf16 reduce_scatter over {size}"]
        assert f"into 2 x {size} ranks" in errors[f"sizes over {size}"]


def test_three_ranks_are_refused(ranks: list) -> None:
    for rank in range(3):
        assert "of 3: the size must be a power of two" in ranks[rank]["errors"]["TreeGroup of 3"]


def test_no_group_is_the_identity_and_the_one_rounding() -> None:
    x = parts((3, 5))[0]
    group = TreeGroup()
    assert (group.shard.rank, group.shard.size) == (0, 1)
    assert_same_bits(group.all_gather(x), x[None])
    for dtype in DTYPES:
        assert_same_bits(group.all_reduce(x, dtype), x.to(dtype))
    with pytest.raises(TreeError, match=r"float32 roots, got torch\.bfloat16"):
        group.all_reduce(x.bfloat16(), torch.float32)
    assert_same_bits(group.all_reduce(x.bfloat16(), torch.bfloat16), x.bfloat16())  # the kernel has rounded the root
