"""Spec of add_bias."""

import torch

from kernels.ops.add_bias import add_bias
from kernels.spec import Inputs, OpSpec, Work, offsets, spread


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    return {
        "root": spread((case["rows"], case["n"]), generator, device, torch.float32),
        "bias": spread((case["n"],), generator, device, dtype),
        "dtype": dtype,
        "groups": offsets(case["rows"], case["groups"], generator).to(device),
    }


ADD_BIAS = OpSpec(
    name="add_bias",
    make=_make,
    run=lambda i: add_bias(i["root"], i["bias"], i["dtype"], groups=i["groups"]),
    reference=lambda i: i["root"] + i["bias"],
    scale=lambda i: i["root"].abs() + i["bias"].abs(),
    cases=({"rows": 1, "n": 1, "groups": 1}, {"rows": 21, "n": 100, "groups": 5}, {"rows": 6, "n": 1500, "groups": 2}),
    space={"rows": (1, 2, 7, 20), "n": (1, 2, 15, 17, 100), "groups": (1, 2, 3, 5, 7, 8)},
    claims=("batch", "position", "padding", "columns", "groups", "threads", "alignment", "strides"),
    accuracy=1.0,
    row_inputs=("root",),
    columns=lambda i, n: {**i, "root": i["root"][:, n], "bias": i["bias"][n]},
    width=lambda i: i["root"].shape[1],
    differentiable=("root", "bias"),
    group_sums=("bias",),
    gradient_accuracy=3.0,
    work=lambda c, size: Work(c["rows"] * c["n"], (4.0 + size) * c["rows"] * c["n"], by_flops=False),
    vendor=lambda i: (i["root"] + i["bias"]).to(i["dtype"]),
    bench=({"rows": 2048, "n": 1024, "groups": 8},),
)
SPECS = (ADD_BIAS,)
