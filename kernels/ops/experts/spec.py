"""Spec of the experts' matmuls, seen from the tokens: the product of each choice."""

import torch

from kernels.ops.dispatch import dispatch, gather
from kernels.ops.dispatch.spec import make_choices
from kernels.ops.experts import STRIPE, expert_matmul, gated_experts
from kernels.ops.swiglu import swiglu
from kernels.spec import Inputs, OpSpec, Sharding, Work, spread


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    K, N = case["K"], case["N"]
    return {
        "x": spread((case["rows"], K), generator, device, dtype),
        "w": spread((case["experts"] * N, K), generator, device, dtype),
        "first": 0,
        **make_choices(case, generator, device),
    }


def _run(i: Inputs, align: int = 16) -> torch.Tensor:
    """[T, k, N]; zeros for the experts of other ranks."""
    slots = dispatch(i["ids"], i["first"], i["experts"], align, i["groups"])
    y = expert_matmul(gather(i["x"], slots), i["w"], slots)[slots.of.clamp(min=0).long()]
    return torch.where(slots.of[..., None] < 0, torch.zeros_like(y), y)


def _matrices(i: Inputs) -> torch.Tensor:
    """[T, k, N, K]: of each choice its expert's."""
    return i["w"].view(i["experts"], -1, i["w"].shape[1])[i["ids"].long()]


def _split(i: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    mine = shard.range(i["experts"])
    rows = i["w"].shape[0] // i["experts"]
    return {
        **i,
        "experts": mine.stop - mine.start,
        "first": mine.start,
        "w": i["w"][mine.start * rows : mine.stop * rows],
    }


_CASES = (
    {"rows": 1, "K": 2, "N": 1, "experts": 1, "k": 1, "groups": 1},
    {"rows": 30, "K": 40, "N": 16, "experts": 8, "k": 8, "groups": 3},
    {"rows": 53, "K": 96, "N": 48, "experts": 16, "k": 3, "groups": 7},
)
_SPACE = {
    "rows": (1, 2, 7, 20),
    "K": (1, 3, 16, 40),
    "experts": (1, 2, 8, 13),
    "k": (1, 2, 8),
    "groups": (1, 2, 5),
}


def _work(case, size: int) -> Work:  # type: ignore[no-untyped-def]
    rows, K, N = case["rows"] * case["k"], case["K"], case["N"]
    return Work(2.0 * rows * K * N, size * (rows * (K + N) + case["experts"] * K * N))


EXPERTS = OpSpec(
    name="expert_matmul",
    make=_make,
    run=_run,
    reference=lambda i: torch.einsum("tk,tink->tin", i["x"], _matrices(i)),
    scale=lambda i: torch.einsum("tk,tink->tin", i["x"].abs(), _matrices(i).abs()),
    cases=_CASES,
    space={**_SPACE, "N": (1, 2, 9, 16)},
    claims=(
        "batch",
        "position",
        "padding",
        "alignments of experts",
        "shard",
        "groups",
        "threads",
        "alignment",
        "strides",
    ),
    accuracy=4.0,
    row_inputs=("x", "ids"),
    variants={"alignments of experts": lambda i, _: _run(i, 128)},
    shardings=(Sharding("experts", most=lambda i: i["experts"], split=_split, join=lambda _, parts: sum(parts)),),
    differentiable=("x", "w"),
    group_sums=("w",),
    gradient_accuracy=8.0,
    work=_work,
    vendor=lambda i: torch.einsum("tk,tink->tin", i["x"], _matrices(i)),
    bench=({"rows": 64, "K": 256, "N": 128, "experts": 16, "k": 4, "groups": 8},),
)


def _make_gated(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    made = _make({**case, "N": 2 * STRIPE * case["N"]}, generator, device, dtype)
    return {**made, "w": made["w"] / 4}  # so that silu is not all or nothing


def _gated(i: Inputs, align: int = 16) -> torch.Tensor:
    slots = dispatch(i["ids"], 0, i["experts"], align, i["groups"])
    return gated_experts(i["x"], i["w"], slots)[slots.of.long()]


def _apart(i: Inputs) -> torch.Tensor:
    slots = dispatch(i["ids"], 0, i["experts"], 16, i["groups"])
    return swiglu(expert_matmul(gather(i["x"], slots), i["w"], slots), STRIPE)[slots.of.long()]


def _halves(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate, up) [T, k, N / 2] of every choice, by torch."""
    whole = torch.einsum("tk,tink->tin", i["x"], _matrices(i))
    return whole.unflatten(2, (-1, 2, STRIPE)).movedim(3, 0).flatten(3).unbind(0)


def _silu_up(i: Inputs) -> torch.Tensor:
    gate, up = _halves(i)
    return gate * torch.sigmoid(gate) * up


def _gated_scale(i: Inputs) -> torch.Tensor:
    """The error of the two products, before silu(gate) up carries it on; of bfloat16 their rounding too."""
    gate, up = _halves({**i, "x": i["x"].abs(), "w": i["w"].abs()})
    return (1 + gate) * (1 + up)


GATED = OpSpec(
    name="gated_experts",
    make=_make_gated,
    run=_gated,
    reference=_silu_up,
    scale=_gated_scale,
    cases=tuple({**case, "N": 1 + case["rows"] % 3} for case in _CASES),
    space={**_SPACE, "N": (1, 2, 3)},
    claims=(
        "batch",
        "position",
        "padding",
        "alignments of experts",
        "in three calls",
        "threads",
        "alignment",
        "strides",
    ),
    accuracy=2.0**17,  # in bfloat16 gate and up are rounded before they meet; "in three calls" is what is sharp
    dtypes=(torch.float32, torch.bfloat16),
    row_inputs=("x", "ids"),
    variants={
        "alignments of experts": lambda i, _: _gated(i, 128),
        "in three calls": lambda i, _: _apart(i),
    },
    work=_work,
    vendor=_silu_up,
    bench=({"rows": 64, "K": 256, "N": 16, "experts": 16, "k": 4, "groups": 8},),
)
SPECS = (EXPERTS, GATED)
