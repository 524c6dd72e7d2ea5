"""Any shape and dtype over gloo: what hypothesis thinks of, many at a time, since ranks take seconds to start."""

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.collectives import TreeGroup
from tests.bits import assert_same_bits
from tests.collectives.processes import run_ranks
from tests.collectives.ranks import wild

WORLD = 4
Shape = tuple[int, ...]
shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple) | st.tuples(st.integers(1, 5000))
cases = st.lists(st.tuples(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float16])), min_size=30)


def input_of(rank: int, number: int, shape: Shape) -> torch.Tensor:
    return wild(97 * number + rank, shape)


def work(cases: list[tuple[Shape, torch.dtype]]) -> list[list[torch.Tensor]]:
    group, rank, out = TreeGroup(dist.group.WORLD), dist.get_rank(), []
    for i, (shape, dtype) in enumerate(cases):
        mine = input_of(rank, i, shape)
        scattered = torch.empty(shape)
        group.reduce_scatter(scattered, torch.stack([mine * 2.0**r for r in range(WORLD)]))
        out.append([group.all_reduce(mine, dtype), group.all_gather(mine.to(dtype)), scattered])
    return out


@settings(max_examples=3)
@given(cases)
def test_any_shape(cases: list[tuple[Shape, torch.dtype]]) -> None:
    ranks = run_ranks(WORLD, work, cases)
    for i, (shape, dtype) in enumerate(cases):
        x = [input_of(rank, i, shape) for rank in range(WORLD)]
        root = (x[0] + x[1]) + (x[2] + x[3])
        for rank in range(WORLD):
            y = [part * 2.0**rank for part in x]
            expected = [root.to(dtype), torch.stack([part.to(dtype) for part in x]), (y[0] + y[1]) + (y[2] + y[3])]
            assert_same_bits(ranks[rank][i], expected, f"{shape} {dtype} on rank {rank}")
