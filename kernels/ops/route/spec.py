"""Spec of the router."""

import torch

from kernels.ops.route import route
from kernels.spec import Inputs, OpSpec, Work


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    experts, k = case["experts"], min(case["k"], case["experts"])
    logits = (torch.randn(case["rows"], experts, generator=generator) * 4).round().div(4)  # full of ties
    return {"logits": logits.to(device), "k": k, "normalize": bool(case["normalize"])}


def _reference(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, ids): a stable sort by falling logit leaves ties in ascending id."""
    ids = torch.argsort(i["logits"], dim=1, descending=True, stable=True)[:, : i["k"]].sort(1).values
    weights = torch.softmax(i["logits"], 1).gather(1, ids)
    return (weights / weights.sum(1, keepdim=True) if i["normalize"] else weights), ids.int()


def _run(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    ids, weights = route(i["logits"], i["k"], i["normalize"])
    return weights, ids


ROUTE = OpSpec(
    name="route",
    make=_make,
    run=_run,
    reference=_reference,
    scale=lambda i: (torch.ones(()), torch.ones(())),
    cases=(
        {"rows": 1, "experts": 1, "k": 1, "normalize": 1},
        {"rows": 30, "experts": 8, "k": 8, "normalize": 0},
        {"rows": 9, "experts": 60, "k": 4, "normalize": 1},
        {"rows": 20, "experts": 128, "k": 8, "normalize": 1},
    ),
    space={"rows": (1, 2, 7, 20), "experts": (1, 2, 3, 8, 16, 37), "k": (1, 2, 3, 8), "normalize": (0, 1)},
    claims=("batch", "position", "padding", "threads", "alignment", "strides"),
    accuracy=4.0,
    dtypes=(torch.float32,),
    row_inputs=("logits",),
    differentiable=("logits",),
    gradient_accuracy=8.0,
    work=lambda c, size: Work(30.0 * c["rows"] * c["experts"], 4.0 * c["rows"] * c["experts"], by_flops=False),
    vendor=lambda i: torch.softmax(i["logits"], 1).topk(i["k"], 1)[0],
    bench=({"rows": 2048, "experts": 128, "k": 8, "normalize": 1},),
)
SPECS = (ROUTE,)
