"""Spec of rows sorted by expert: what a row holds, wherever it stands, and the sum that is its gradient."""

import torch

from kernels.ops.dispatch import dispatch, gather, route_and_dispatch
from kernels.spec import Inputs, OpSpec, Work, offsets, spread


def choices(rows: int, experts: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Draws int32 [rows, k]: distinct experts in ascending id; some are chosen by all, some by nobody."""
    liked = torch.rand(rows, experts, generator=generator) + 0.7 * torch.rand(experts, generator=generator)
    return liked.topk(k, 1).indices.sort(1).values.int()


def make_choices(case, generator, device) -> Inputs:  # type: ignore[no-untyped-def]
    """Draws the inputs of a case: choices int32 [rows, k], the number of experts, and the groups of tokens."""
    rows, experts = case["rows"], case["experts"]
    ids = choices(rows, experts, min(case["k"], experts), generator).to(device)
    return {"ids": ids, "experts": experts, "groups": offsets(rows, case["groups"], generator).to(device)}


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    return {"x": spread((case["rows"], case["n"]), generator, device, dtype), **make_choices(case, generator, device)}


def _rows_of(i: Inputs, align: int = 16) -> torch.Tensor:
    """[T, k, n]: the row of every choice."""
    slots = dispatch(i["ids"], 0, i["experts"], align, i["groups"])
    return gather(i["x"], slots)[slots.of.long()]


DISPATCH = OpSpec(
    name="dispatch",
    make=_make,
    run=_rows_of,
    reference=lambda i: i["x"][:, None].expand(-1, i["ids"].shape[1], -1).clone(),
    cases=(
        {"rows": 1, "n": 1, "experts": 1, "k": 1, "groups": 1},
        {"rows": 30, "n": 40, "experts": 8, "k": 8, "groups": 3},
        {"rows": 53, "n": 17, "experts": 60, "k": 4, "groups": 7},
    ),
    space={"rows": (1, 2, 7, 20), "n": (1, 3, 16), "experts": (1, 2, 8, 37), "k": (1, 2, 8), "groups": (1, 2, 5)},
    claims=("batch", "position", "padding", "alignments of experts", "threads", "alignment", "strides"),
    accuracy=0.0,
    row_inputs=("x", "ids"),
    variants={"alignments of experts": lambda i, _: _rows_of(i, 64)},
    differentiable=("x",),
    gradient_accuracy=4.0,
    work=lambda c, size: Work(0.0, size * c["rows"] * c["n"] * (1.0 + c["k"]), backward=1.0, by_flops=False),
    vendor=lambda i: i["x"].repeat_interleave(i["ids"].shape[1], 0).unflatten(0, i["ids"].shape),
    bench=({"rows": 1024, "n": 2048, "experts": 128, "k": 8, "groups": 8},),
)


def _make_routed(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    logits = torch.randn(case["rows"], case["experts"], generator=generator).to(device)
    x = spread((case["rows"], case["n"]), generator, device, dtype)
    return {"x": x, "logits": logits, "k": min(case["k"], case["experts"])}


def _routed(i: Inputs, align: int = 16) -> torch.Tensor:
    """[T, k, n]: the row of every choice, weighted, in float32."""
    experts = i["logits"].shape[1]
    ids, weights, slots = route_and_dispatch(i["logits"], i["k"], True, 0, experts, align)
    return gather(i["x"], slots)[slots.of.long()].float() * weights[..., None]


def _routed_reference(i: Inputs) -> torch.Tensor:
    ids = torch.argsort(i["logits"], dim=1, descending=True, stable=True)[:, : i["k"]].sort(1).values
    weights = torch.softmax(i["logits"], 1).gather(1, ids)
    return i["x"][:, None] * (weights / weights.sum(1, keepdim=True))[..., None]


ROUTED = OpSpec(
    name="route_and_dispatch",
    make=_make_routed,
    run=_routed,
    reference=_routed_reference,
    scale=lambda i: i["x"].abs()[:, None],
    cases=(
        {"rows": 1, "n": 1, "experts": 1, "k": 1},
        {"rows": 30, "n": 40, "experts": 8, "k": 8},
        {"rows": 53, "n": 17, "experts": 60, "k": 4},
    ),
    space={"rows": (1, 2, 7, 20), "n": (1, 3, 16), "experts": (1, 2, 8, 37), "k": (1, 2, 8)},
    claims=("batch", "position", "padding", "alignments of experts", "threads", "alignment", "strides"),
    accuracy=8.0,
    row_inputs=("x", "logits"),
    variants={"alignments of experts": lambda i, _: _routed(i, 64)},
    work=lambda c, size: Work(0.0, size * c["rows"] * c["n"] * (1.0 + c["k"]), by_flops=False),
    vendor=_routed_reference,
    bench=({"rows": 64, "n": 2048, "experts": 128, "k": 8},),
)
SPECS = (DISPATCH, ROUTED)
