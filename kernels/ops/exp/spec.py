"""Spec of the exponential."""

import torch

from kernels.ops.exp import exp
from kernels.spec import Inputs, OpSpec, Work, spread


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    return {"x": spread((case["rows"], case["n"]), generator, device, dtype)}


EXP = OpSpec(
    name="exp",
    make=_make,
    run=lambda i: exp(i["x"]),
    reference=lambda i: i["x"].exp(),
    cases=({"rows": 1, "n": 1}, {"rows": 19, "n": 33}, {"rows": 40, "n": 1000}),
    space={"rows": (1, 2, 7, 20), "n": (1, 2, 8, 15, 16, 17, 40)},
    claims=("batch", "position", "padding", "threads", "alignment", "strides"),
    accuracy=1.0,
    dtypes=(torch.float32,),
    row_inputs=("x",),
    differentiable=("x",),
    gradient_accuracy=2.0,
    work=lambda c, size: Work(12.0 * c["rows"] * c["n"], 8.0 * c["rows"] * c["n"], backward=1.5, by_flops=False),
    vendor=lambda i: i["x"].exp(),
    bench=({"rows": 1024, "n": 1024},),
)
SPECS = (EXP,)
