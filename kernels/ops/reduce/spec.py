"""Spec of the sums over rows and of the sums of squares."""

import torch

from kernels.ops.reduce import fold_rows, square_rows, sum_rows
from kernels.spec import Inputs, OpSpec, Work, offsets, spread


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    x = spread((case["rows"], case["n"]), generator, device, dtype)
    return {"x": x, "groups": offsets(case["rows"], case["groups"], generator).to(device)}


def _make_squares(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    return {"x": spread((case["rows"], case["n"]), generator, device, dtype)}


_N = (1, 2, 15, 16, 17, 31, 33, 48, 100)
SUM_ROWS = OpSpec(
    name="sum_rows",
    make=_make,
    run=lambda i: sum_rows(i["x"], i["groups"]),
    reference=lambda i: i["x"].sum(0),
    scale=lambda i: i["x"].abs().sum(0),
    cases=({"rows": 1, "n": 1, "groups": 1}, {"rows": 100, "n": 33, "groups": 7}, {"rows": 64, "n": 48, "groups": 64}),
    space={"rows": (1, 2, 9, 40), "n": _N, "groups": (1, 2, 3, 4, 5, 6, 7, 8, 11)},
    claims=("columns", "groups", "threads", "alignment", "strides"),
    accuracy=2.0,
    dtypes=(torch.float32,),
    row_inputs=("x",),
    columns=lambda i, n: {**i, "x": i["x"][:, n]},
    width=lambda i: i["x"].shape[1],
    group_sums=("output",),
    work=lambda c, size: Work(c["rows"] * c["n"], 4.0 * c["rows"] * c["n"], by_flops=False),
    vendor=lambda i: i["x"].sum(0),
    bench=({"rows": 4096, "n": 1024, "groups": 32},),
)
FOLD_ROWS = OpSpec(
    name="fold_rows",
    make=_make_squares,
    run=lambda i: fold_rows(i["x"]),
    reference=lambda i: i["x"].sum(0),
    scale=lambda i: i["x"].abs().sum(0),
    cases=({"rows": 1, "n": 1}, {"rows": 2050, "n": 3}, {"rows": 37, "n": 100}),
    space={"rows": (1, 2, 3, 9, 40), "n": _N},
    claims=("columns", "threads", "alignment", "strides"),
    accuracy=2.0,
    dtypes=(torch.float32,),
    columns=lambda i, n: {"x": i["x"][:, n]},
    width=lambda i: i["x"].shape[1],
    work=lambda c, size: Work(c["rows"] * c["n"], 4.0 * c["rows"] * c["n"], by_flops=False),
    vendor=lambda i: i["x"].sum(0),
    bench=({"rows": 151936, "n": 1},),
)
SQUARE_ROWS = OpSpec(
    name="square_rows",
    make=_make_squares,
    run=lambda i: square_rows(i["x"]),
    reference=lambda i: i["x"].square().sum(1),
    cases=({"rows": 1, "n": 1}, {"rows": 19, "n": 100}, {"rows": 5, "n": 512}),
    space={"rows": (1, 2, 9, 40), "n": _N},
    claims=("batch", "position", "padding", "threads", "alignment", "strides"),
    accuracy=3.0,
    dtypes=(torch.float32,),
    row_inputs=("x",),
    work=lambda c, size: Work(2.0 * c["rows"] * c["n"], 4.0 * c["rows"] * c["n"], by_flops=False),
    vendor=lambda i: i["x"].square().sum(1),
    bench=({"rows": 4096, "n": 1024},),
)
SPECS = (SUM_ROWS, FOLD_ROWS, SQUARE_ROWS)
