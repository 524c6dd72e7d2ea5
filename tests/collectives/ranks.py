"""What one rank does in the tests of the collectives: it returns its part of everything, and the parent judges."""

import numpy as np
import torch
import torch.distributed as dist

from kernels.collectives import TreeGroup
from kernels.tree import TreeError

WORLD = 4
SHAPES = [(1,), (7,), (3, 5), (2, 3, 4), (1024,)]
DTYPES = [torch.float32, torch.bfloat16]


def wild(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 over the whole range of exponents, with subnormals, both zeros and pairs that cancel."""
    random = np.random.default_rng(seed)
    x = np.ldexp(random.standard_normal(shape), random.integers(-140, 100, shape)).astype(np.float32)
    kind = random.integers(0, 10, shape)
    x = np.where(kind == 0, np.float32(0), np.where(kind == 1, np.float32(-0.0), x))
    near = (1 + random.standard_normal(shape) * 1e-6) * random.choice([-1.0, 1.0], shape)
    return torch.from_numpy(np.where(kind > 5, near, x).astype(np.float32))


def parts(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """The subtree root of every rank of the world."""
    return [wild(1000 * rank + len(shape) + shape[0], shape) for rank in range(WORLD)]


def error_of(attempt) -> str:
    try:
        attempt()
    except TreeError as error:
        return str(error)
    return "no error"


def work() -> dict:
    rank = dist.get_rank()
    subgroups = {1: [[r] for r in range(4)], 2: [[0, 1], [2, 3]], 4: [[0, 1, 2, 3]]}
    out: dict = {"errors": {}}
    for size, members in subgroups.items():
        groups = [dist.new_group(m) for m in members]  # every rank takes part in making every group
        raw = groups[rank // size]
        group = TreeGroup(raw)
        out[size] = {"shard": (group.shard.rank, group.shard.size), "gathered": [], "reduced": [], "scattered": []}
        for shape in SHAPES:
            mine = parts(shape)[rank]
            out[size]["gathered"].append(group.all_gather(mine))
            out[size]["reduced"] += [group.all_reduce(mine, dtype) for dtype in DTYPES]
            strided = mine.new_zeros(*shape, 2)
            strided[..., 0] = mine
            assert not shape[0] > 1 or not strided[..., 0].is_contiguous()
            out[size]["reduced"].append(group.all_reduce(strided[..., 0], torch.float32))
            output = torch.full(shape, torch.nan)
            whole = torch.stack([parts(shape)[rank] * 2.0**i for i in range(size)])
            group.reduce_scatter(output, whole.flatten())
            out[size]["scattered"].append(output)
        out[size]["integers"] = group.all_gather(torch.tensor([[rank, -rank]], dtype=torch.int64))
        out["errors"][f"bf16 all_reduce over {size}"] = error_of(
            lambda g=group: g.all_reduce(torch.ones(4, dtype=torch.bfloat16), torch.float32)
        )
        out["errors"][f"bf16 reduce_scatter over {size}"] = error_of(
            lambda g=group, n=size: g.reduce_scatter(torch.ones(2), torch.ones(2 * n, dtype=torch.bfloat16))
        )
        out["errors"][f"sizes over {size}"] = error_of(
            lambda g=group, n=size: g.reduce_scatter(torch.ones(2), torch.ones(2 * n + 1))
        )
    three = dist.new_group([0, 1, 2])
    if rank < 3:
        out["errors"]["TreeGroup of 3"] = error_of(lambda: TreeGroup(three))
    return out
