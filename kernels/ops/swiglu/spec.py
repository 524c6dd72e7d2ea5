"""Spec of SwiGLU."""

import torch

from kernels.ops.swiglu import swiglu
from kernels.spec import Inputs, OpSpec, Sharding, Work, concatenated, spread


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    return {"x": spread((case["rows"], 2 * case["n"]), generator, device, dtype, octaves=4)}


def _reference(i: Inputs) -> torch.Tensor:
    gate, up = i["x"].chunk(2, 1)
    return gate * torch.sigmoid(gate) * up


def _columns(i: Inputs, at: slice) -> Inputs:
    gate, up = i["x"].chunk(2, 1)
    return {"x": torch.cat([gate[:, at], up[:, at]], 1)}


def _vendor(i: Inputs) -> torch.Tensor:
    gate, up = i["x"].chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


SWIGLU = OpSpec(
    name="swiglu",
    make=_make,
    run=lambda i: swiglu(i["x"]),
    reference=_reference,
    cases=({"rows": 1, "n": 1}, {"rows": 19, "n": 100}, {"rows": 8, "n": 512}),
    space={"rows": (1, 2, 7, 20), "n": (1, 2, 8, 15, 16, 17, 40)},
    claims=("batch", "position", "padding", "columns", "shard", "threads", "alignment", "strides"),
    accuracy=3.0,
    row_inputs=("x",),
    columns=_columns,
    width=lambda i: i["x"].shape[1] // 2,
    shardings=(
        Sharding(
            "width",
            most=lambda i: i["x"].shape[1] // 2,
            split=lambda i, shard: _columns(i, shard.range(i["x"].shape[1] // 2)),
            join=concatenated(1),
        ),
    ),
    differentiable=("x",),
    gradient_accuracy=4.0,
    work=lambda c, size: Work(
        8.0 * c["rows"] * c["n"], 3.0 * size * c["rows"] * c["n"], backward=5 / 3, by_flops=False
    ),
    vendor=_vendor,
    bench=({"rows": 2048, "n": 1024},),
)
SPECS = (SWIGLU,)
