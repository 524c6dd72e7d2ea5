"""Spec of the matmul of block-scaled FP8. Its gradients are `matmul_dx` of the dequantized weight, and `matmul_dw`."""

import torch

from kernels.ops.matmul_fp8 import matmul_fp8
from kernels.ops.quantize import BLOCK, FP8, quantize_blocks
from kernels.ops.quantize.spec import each_element, reference_scales
from kernels.spec import Case, Inputs, OpSpec, Sharding, Work, concatenated, offsets, spread, tree_sum
from kernels.tree import Shard

GPU_ACCURACY = 2.0**14
"""A tensor core that adds products of e4m3 drops what of each lies 13 bits or more below the largest: 2^-13 is 2^10 in units of
eps32, and a block has 128 such terms, whose losses partly cancel."""


def _shape(case: Case) -> tuple[int, int, int]:
    return case["M"], BLOCK * case["columns"], BLOCK * case["blocks"] * case["leaves"]


def _make(case: Case, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
    M, N, K = _shape(case)
    return {
        "x": spread((M, K), generator, device, dtype),
        "w": spread((N, K), generator, device, dtype),
        "leaves": case["leaves"],
        "groups": offsets(M, case["groups"], generator).to(device),
        "power_of_two": bool(case["power_of_two"]),
    }


def _run(i: Inputs, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return matmul_fp8(
        i["x"], i["w"], i["leaves"], groups=i["groups"], out_dtype=out_dtype, power_of_two=i["power_of_two"]
    )


def _of_quantized(i: Inputs, _: torch.Generator) -> torch.Tensor:
    return _run({**i, "w": quantize_blocks(i["w"], i["power_of_two"])})


def _rounded(x: torch.Tensor, height: int, power_of_two: bool) -> torch.Tensor:
    """x after quantization, in float64, by torch's own conversion; x is float64 of bfloat16 values."""
    x = x.detach()
    scales = each_element(reference_scales(x, height, power_of_two), height)
    return (x.float() / scales.float()).to(FP8).double() * scales


def _reference(i: Inputs) -> torch.Tensor:
    """The product of what is rounded, with gradients that are straight-through."""
    x, w = _rounded(i["x"], 1, i["power_of_two"]), _rounded(i["w"], BLOCK, i["power_of_two"])
    through = (
        i["x"] @ (i["w"] + (w.bfloat16().double() - i["w"]).detach()).T
    )  # dx of the dequantized w, dw of x as given
    return through + (x @ w.T - through).detach()


def _scale(i: Inputs) -> torch.Tensor:
    return _rounded(i["x"], 1, i["power_of_two"]).abs() @ _rounded(i["w"], BLOCK, i["power_of_two"]).abs().T


def _contraction(i: Inputs, shard: Shard) -> Inputs:
    k = shard.range(i["x"].shape[1])
    return {**i, "x": i["x"][:, k], "w": i["w"][:, k], "leaves": i["leaves"] // shard.size}


def _work(case: Case, size: int) -> Work:
    M, N, K = _shape(case)
    return Work(2.0 * M * N * K, size * (M * K + M * N) + N * K, backward=0)


def _describe(case: Case) -> str:
    M, N, K = _shape(case)
    scales = ", scales powers of two" if case["power_of_two"] else ""
    return f"M {M}, N {N}, K {K}, {case['leaves']} leaves{scales}"


MATMUL = OpSpec(
    name="matmul_fp8",
    make=_make,
    run=_run,
    reference=_reference,
    scale=_scale,
    cases=(
        {"M": 1, "columns": 1, "blocks": 1, "leaves": 1, "groups": 1, "power_of_two": 0},
        {"M": 33, "columns": 2, "blocks": 2, "leaves": 4, "groups": 5, "power_of_two": 1},
        {"M": 41, "columns": 8, "blocks": 1, "leaves": 8, "groups": 7, "power_of_two": 0},
    ),
    space={
        "M": (1, 2, 7, 8, 9, 31, 33),
        "columns": (1, 2),
        "blocks": (1, 2),
        "leaves": (1, 2, 4, 8),
        "groups": (1, 2, 3, 5, 8),
        "power_of_two": (0, 1),
    },
    claims=("batch", "position", "padding", "shard", "groups", "threads", "alignment", "strides", "quantized before"),
    accuracy=4.0,
    gpu_accuracy=GPU_ACCURACY,
    dtypes=(torch.bfloat16,),
    families=("hopper",),
    row_inputs=("x",),
    shardings=(
        Sharding(
            "contraction",
            most=lambda i: i["leaves"],
            split=_contraction,
            run=lambda i: _run(i, torch.float32),
            join=tree_sum("x"),
        ),
        Sharding(
            "output width",
            most=lambda i: i["w"].shape[0] // BLOCK,
            split=lambda i, shard: {**i, "w": i["w"][shard.range(i["w"].shape[0])]},
            join=concatenated(1),
        ),
    ),
    variants={"quantized before": _of_quantized},
    differentiable=("x", "w"),
    group_sums=("w",),
    gradient_accuracy=4.0,
    work=_work,
    vendor=lambda i: i["x"] @ i["w"].T,
    bench=(
        {"M": 16, "columns": 8, "blocks": 1, "leaves": 8, "groups": 8, "power_of_two": 0},
        {"M": 256, "columns": 8, "blocks": 1, "leaves": 8, "groups": 8, "power_of_two": 0},
    ),
    describe=_describe,
)
SPECS = (MATMUL,)
