"""Spec of matmul and of its two gradients, each of which is a contraction with a sharding of its own."""

import torch

from kernels.ops.matmul import input_gradient, matmul, weight_gradient
from kernels.spec import Inputs, OpSpec, Sharding, Work, offsets, spread, tree_sum

# Row counts on both sides of the tile sizes of every instruction set, leaves of odd lengths, more leaves than lanes.
_SPACE = {
    "M": (1, 2, 3, 5, 8, 12, 13, 16, 17, 24, 25, 33, 40),
    "columns": (1, 2, 3, 5, 9),  # N = columns * leaves
    "leaf": (1, 2, 7, 16, 20, 33),  # K = leaf * leaves
    "leaves": (1, 2, 4, 8, 16),
    "groups": (1, 2, 3, 5, 6, 7, 8, 13),
}
_CASES = (
    {"M": 1, "columns": 1, "leaf": 1, "leaves": 1, "groups": 1},
    {"M": 7, "columns": 5, "leaf": 20, "leaves": 8, "groups": 5},
    {"M": 53, "columns": 9, "leaf": 48, "leaves": 8, "groups": 7},
    {"M": 33, "columns": 37, "leaf": 33, "leaves": 1, "groups": 8},
    {"M": 16, "columns": 3, "leaf": 5, "leaves": 32, "groups": 3},
)
_BENCH = tuple({"M": m, "columns": n // 8, "leaf": k // 8, "leaves": 8, "groups": 8}
               for m in (16, 64, 256, 1024) for n, k in ((768, 256), (1024, 1024)))  # fmt: skip


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    M, N, K = case["M"], case["columns"] * case["leaves"], case["leaf"] * case["leaves"]
    return {
        "x": spread((M, K), generator, device, dtype),
        "w": spread((N, K), generator, device, dtype),
        "dy": spread((M, N), generator, device, dtype),
        "leaves": case["leaves"],
        "groups": offsets(M, case["groups"], generator).to(device),
    }


def _forward_shard(inputs: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    k = shard.range(inputs["x"].shape[1])
    return {**inputs, "x": inputs["x"][:, k], "w": inputs["w"][:, k], "leaves": inputs["leaves"] // shard.size}


def _dx_shard(inputs: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    n = shard.range(inputs["w"].shape[0])
    return {**inputs, "dy": inputs["dy"][:, n], "w": inputs["w"][n], "leaves": inputs["leaves"] // shard.size}


def _work(case, size: int) -> Work:  # type: ignore[no-untyped-def]
    M, N, K = case["M"], case["columns"] * case["leaves"], case["leaf"] * case["leaves"]
    # The gradients are specs of their own, so the benchmark times them there.
    return Work(2.0 * M * N * K, size * (M * K + N * K + M * N), backward=0)


def _describe(case) -> str:  # type: ignore[no-untyped-def]
    M, N, K = case["M"], case["columns"] * case["leaves"], case["leaf"] * case["leaves"]
    return f"M {M}, N {N}, K {K}, {case['leaves']} leaves"


FORWARD = OpSpec(
    name="matmul",
    make=_make,
    run=lambda i: matmul(i["x"], i["w"], i["leaves"], groups=i["groups"]),
    reference=lambda i: i["x"] @ i["w"].T,
    scale=lambda i: i["x"].abs() @ i["w"].abs().T,
    cases=_CASES,
    space=_SPACE,
    claims=("batch", "position", "padding", "columns", "shard", "groups", "threads", "alignment", "strides"),
    accuracy=4.0,
    row_inputs=("x",),
    columns=lambda i, n: {**i, "w": i["w"][n]},
    width=lambda i: i["w"].shape[0],
    shardings=(
        Sharding(
            "contraction",
            most=lambda i: i["leaves"],
            split=_forward_shard,
            run=lambda i: matmul(i["x"], i["w"], i["leaves"], out_dtype=torch.float32),
            join=tree_sum("x"),
        ),
    ),
    differentiable=("x", "w"),
    group_sums=("w",),
    gradient_accuracy=4.0,
    work=_work,
    vendor=lambda i: i["x"] @ i["w"].T,
    bench=_BENCH,
    describe=_describe,
)
INPUT_GRADIENT = OpSpec(
    name="matmul_dx",
    make=_make,
    run=lambda i: input_gradient(i["dy"], i["w"], i["leaves"]),
    reference=lambda i: i["dy"] @ i["w"],
    scale=lambda i: i["dy"].abs() @ i["w"].abs(),
    cases=_CASES,
    space=_SPACE,
    claims=("batch", "position", "padding", "columns", "shard", "threads", "alignment", "strides"),
    accuracy=4.0,
    row_inputs=("dy",),
    columns=lambda i, k: {**i, "w": i["w"][:, k]},
    width=lambda i: i["w"].shape[1],
    shardings=(
        Sharding(
            "output width",
            most=lambda i: i["leaves"],
            split=_dx_shard,
            join=tree_sum("dy"),
            dtypes=(torch.float32,),  # a gradient has the dtype of dy: a bfloat16 shard would round before the join
        ),
    ),
    work=_work,
    vendor=lambda i: i["dy"] @ i["w"],
    bench=_BENCH,
    describe=_describe,
)
WEIGHT_GRADIENT = OpSpec(
    name="matmul_dw",
    make=_make,
    run=lambda i: weight_gradient(i["dy"], i["x"], i["groups"]),
    reference=lambda i: i["dy"].T @ i["x"],
    scale=lambda i: i["dy"].abs().T @ i["x"].abs(),
    cases=_CASES,
    space=_SPACE,
    claims=("columns", "groups", "threads", "alignment", "strides"),
    accuracy=4.0,
    row_inputs=("dy", "x"),
    columns=lambda i, k: {**i, "x": i["x"][:, k]},
    width=lambda i: i["x"].shape[1],
    group_sums=("output",),
    work=_work,
    vendor=lambda i: i["dy"].T @ i["x"],
    bench=_BENCH,
    describe=_describe,
)
SPECS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
