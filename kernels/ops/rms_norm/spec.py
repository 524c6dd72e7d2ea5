"""Spec of rms_norm."""

import torch

from kernels.ops.rms_norm import add_rms_norm, rms_norm
from kernels.spec import Inputs, OpSpec, Work, offsets, spread


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    shape = (case["rows"], case["heads"], case["n"]) if case["heads"] else (case["rows"], case["n"])
    return {
        "x": spread(shape, generator, device, dtype),
        "weight": spread((case["n"],), generator, device, dtype, octaves=1),
        "eps": 1e-6,
        "groups": offsets(case["rows"], case["groups"], generator).to(device),
    }


def _reference(i: Inputs) -> torch.Tensor:
    return i["x"] / (i["x"].square().mean(-1, keepdim=True) + i["eps"]).sqrt() * i["weight"]


def _work(case, size: int) -> Work:  # type: ignore[no-untyped-def]
    elements = float(case["rows"] * max(1, case["heads"]) * case["n"])
    return Work(4 * elements, 2 * size * elements, by_flops=False)


RMS_NORM = OpSpec(
    name="rms_norm",
    make=_make,
    run=lambda i: rms_norm(i["x"], i["weight"], i["eps"], groups=i["groups"]),
    reference=_reference,
    cases=(
        {"rows": 1, "heads": 0, "n": 5, "groups": 1},
        {"rows": 21, "heads": 0, "n": 100, "groups": 5},
        {"rows": 9, "heads": 3, "n": 32, "groups": 6},
        {"rows": 6, "heads": 0, "n": 512, "groups": 2},
    ),
    space={"rows": (1, 2, 7, 20), "heads": (0, 1, 3), "n": (2, 15, 16, 17, 48, 100), "groups": (1, 2, 3, 5, 7, 8)},
    claims=("batch", "position", "padding", "groups", "threads", "alignment", "strides"),
    accuracy=3.0,
    row_inputs=("x",),
    differentiable=("x", "weight"),
    group_sums=("weight",),
    gradient_accuracy=3.0,
    contiguous=("weight", "groups"),
    work=_work,
    vendor=lambda i: torch.nn.functional.rms_norm(i["x"], i["weight"].shape, i["weight"], i["eps"]),
    bench=({"rows": 2048, "heads": 0, "n": 1024, "groups": 8}, {"rows": 512, "heads": 16, "n": 64, "groups": 8}),
)


def _make_add(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    """Sixteenths whose sums are exact in bfloat16, so that the float64 reference need not round them."""
    x, delta = (
        (torch.randint(-127, 128, (case["rows"], case["n"]), generator=generator) / 16).to(dtype).to(device)
        for _ in range(2)
    )
    return {**_make({**case, "heads": 0}, generator, device, dtype), "x": x, "delta": delta}


def _add_reference(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    total = i["x"] + i["delta"]
    return _reference({**i, "x": total}), total


def _one_after_the_other(i: Inputs, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    total = i["x"] + i["delta"]
    return rms_norm(total, i["weight"], i["eps"], groups=i["groups"]), total


ADD_RMS_NORM = OpSpec(
    name="add_rms_norm",
    make=_make_add,
    run=lambda i: add_rms_norm(i["x"], i["delta"], i["weight"], i["eps"], groups=i["groups"]),
    reference=_add_reference,
    cases=({"rows": 1, "n": 5, "groups": 1}, {"rows": 21, "n": 100, "groups": 5}, {"rows": 6, "n": 1500, "groups": 2}),
    space={"rows": (1, 2, 7, 20), "n": (2, 15, 16, 17, 48, 100), "groups": (1, 2, 3, 5, 7, 8)},
    claims=("batch", "position", "padding", "groups", "threads", "alignment", "strides", "unfused"),
    accuracy=3.0,
    row_inputs=("x", "delta"),
    variants={"unfused": _one_after_the_other},
    differentiable=("x", "delta", "weight"),
    group_sums=("weight",),
    gradient_accuracy=3.0,
    contiguous=("weight", "groups"),
    work=lambda case, size: Work(5.0 * case["rows"] * case["n"], 4.0 * size * case["rows"] * case["n"], by_flops=False),
    vendor=lambda i: torch.nn.functional.rms_norm(i["x"] + i["delta"], i["weight"].shape, i["weight"], i["eps"]),
    bench=({"rows": 2048, "n": 1024, "groups": 8},),
)
SPECS = (RMS_NORM, ADD_RMS_NORM)
