"""Specs of the merge of a low-rank addition, and of its gradient."""

import torch

from kernels.ops.dispatch import Slots, dispatch, gather
from kernels.ops.dispatch.spec import make_choices
from kernels.ops.experts import STRIPE
from kernels.ops.low_rank import (
    low_rank_gradients,
    low_rank_gradients_by_leaf,
    merge_low_rank,
    with_low_rank_gradient,
)
from kernels.ops.low_rank.experts import expert_low_rank_gradients, with_expert_low_rank_gradient
from kernels.spec import Inputs, OpSpec, Work, offsets, spread

_SCALE = 0.3


def _make_merge(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    N, K, rank = case["rows"], case["n"], case["rank"]
    return {
        "w": spread((N, K), generator, device, dtype),
        "a": spread((rank, K), generator, device, torch.float32),
        "b": spread((N, rank), generator, device, torch.float32),
        "dtype": dtype,
    }


MERGE = OpSpec(
    name="merge_low_rank",
    make=_make_merge,
    run=lambda i: merge_low_rank(i["w"], i["a"], i["b"], _SCALE, i["dtype"]),
    reference=lambda i: i["w"] + _SCALE * i["b"] @ i["a"],
    scale=lambda i: i["w"].abs() + _SCALE * i["b"].abs() @ i["a"].abs(),
    cases=({"rows": 1, "n": 1, "rank": 1}, {"rows": 21, "n": 100, "rank": 16}, {"rows": 40, "n": 300, "rank": 33}),
    space={"rows": (1, 2, 7, 20, 33), "n": (1, 2, 15, 17, 100), "rank": (1, 2, 3, 8, 16, 48)},
    claims=("batch", "position", "padding", "columns", "threads", "alignment", "strides"),
    accuracy=4.0,
    row_inputs=("w", "b"),
    columns=lambda i, k: {**i, "w": i["w"][:, k], "a": i["a"][:, k]},
    width=lambda i: i["w"].shape[1],
    work=lambda c, size: Work(
        2.0 * c["rows"] * c["n"] * c["rank"], 2.0 * size * c["rows"] * c["n"], backward=0, by_flops=False
    ),
    vendor=lambda i: (i["w"].float() + _SCALE * (i["b"] @ i["a"])).to(i["dtype"]),
    bench=({"rows": 1024, "n": 1024, "rank": 32},),
)


def _make_gradient(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    leaves, rank, rows = case["leaves"], case["rank"], case["rows"]
    sections = [case["columns"] * leaves * (i + 1) for i in range(case["sections"])]
    N, K = sum(sections), case["leaf"] * leaves
    return {
        "dy": spread((rows, N), generator, device, dtype),
        "x": spread((rows, K), generator, device, dtype),
        "a": spread((len(sections) * rank, K), generator, device, dtype),
        "b": spread((N, rank), generator, device, dtype),
        "sections": sections,
        "leaves": leaves,
        "groups": offsets(rows, case["groups"], generator).to(device),
        "rounding": torch.finfo(dtype).eps / torch.finfo(torch.float32).eps,
    }


def _by_autograd(i: Inputs, _: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (i[name].float().requires_grad_() for name in ("a", "b"))
    y = with_low_rank_gradient(torch.zeros_like(i["dy"]), i["x"], a, b, _SCALE, i["sections"], i["leaves"], i["groups"])
    y.backward(i["dy"])
    assert a.grad is not None and b.grad is not None
    return a.grad, b.grad


def _by_leaf(i: Inputs, _: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    parts = zip(
        i["dy"].split(i["sections"], 1), i["a"].split(i["b"].shape[1]), i["b"].split(i["sections"]), strict=True
    )
    both = [
        low_rank_gradients_by_leaf(dy.chunk(i["leaves"], 1), i["x"], a, b, _SCALE, i["groups"]) for dy, a, b in parts
    ]
    return torch.cat([da for da, _ in both]), torch.cat([db for _, db in both])


def _products(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """da and db by way of the gradient of the whole weight."""
    da, db = [], []
    whole = i["dy"].T @ i["x"]
    for a, b, dw in zip(
        i["a"].split(i["b"].shape[1]), i["b"].split(i["sections"]), whole.split(i["sections"]), strict=True
    ):
        da.append(_SCALE * b.T @ dw)
        db.append(_SCALE * dw @ a.T)
    return torch.cat(da), torch.cat(db)


def _magnitude(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what is added up; u and v were rounded to the dtype of x."""
    da, db = _products({**i, **{name: i[name].abs() for name in ("dy", "x", "a", "b")}})
    return da * i["rounding"], db * i["rounding"]


def _flops(case) -> float:  # type: ignore[no-untyped-def]
    N = case["columns"] * case["leaves"] * sum(range(1, case["sections"] + 1))
    K = case["leaf"] * case["leaves"] * case["sections"]
    return 4.0 * case["rows"] * case["rank"] * (N + K)


GRADIENT = OpSpec(
    name="low_rank_gradients",
    make=_make_gradient,
    run=lambda i: low_rank_gradients(i["dy"], i["x"], i["a"], i["b"], _SCALE, i["sections"], i["leaves"], i["groups"]),
    variants={"the backward pass": _by_autograd, "leaf by leaf": _by_leaf},
    reference=_products,
    scale=_magnitude,
    cases=(
        {"rows": 1, "columns": 1, "leaf": 1, "leaves": 1, "rank": 1, "sections": 1, "groups": 1},
        {"rows": 21, "columns": 2, "leaf": 5, "leaves": 4, "rank": 16, "sections": 3, "groups": 5},
        {"rows": 40, "columns": 3, "leaf": 16, "leaves": 8, "rank": 32, "sections": 2, "groups": 7},
    ),
    space={
        "rows": (1, 2, 7, 20, 33),
        "columns": (1, 2, 5),
        "leaf": (1, 2, 7, 16),
        "leaves": (1, 2, 8),
        "rank": (1, 2, 8, 16),
        "sections": (1, 2, 3),
        "groups": (1, 2, 3, 5, 8),
    },
    claims=("groups", "threads", "alignment", "strides", "the backward pass", "leaf by leaf"),
    accuracy=4.0,
    row_inputs=("dy", "x"),
    group_sums=("output",),
    work=lambda c, size: Work(_flops(c), size * _flops(c) / c["rank"], backward=0),
    vendor=_products,
    bench=({"rows": 512, "columns": 64, "leaf": 32, "leaves": 8, "rank": 32, "sections": 2, "groups": 8},),
)


def _make_experts(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    rank, matrices = case["rank"], case["matrices"]
    N, K, E = case["N"] * (2 * STRIPE if matrices == 2 else 1), case["K"], case["experts"]
    choices = make_choices(case, generator, device)
    return {
        "dy": spread((*choices["ids"].shape, N), generator, device, dtype),
        "x": spread((case["rows"], K), generator, device, dtype),
        "a": spread((E * matrices * rank, K), generator, device, dtype),
        "b": spread((E * N, rank), generator, device, dtype),
        "stripe": STRIPE if matrices == 2 else 0,
        "rounding": torch.finfo(dtype).eps / torch.finfo(torch.float32).eps,
        **choices,
    }


def _expert_rows(i: Inputs, align: int) -> tuple[torch.Tensor, torch.Tensor, Slots]:
    """Returns (dy, x, slots), the rows as experts compute them."""
    slots = dispatch(i["ids"], 0, i["experts"], align, i["groups"])
    dy = i["dy"].new_zeros(slots.capacity, i["dy"].shape[2])
    dy[slots.of.flatten().long()] = i["dy"].flatten(0, 1)
    return dy, gather(i["x"], slots), slots


def _of_experts(i: Inputs, align: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    dy, x, slots = _expert_rows(i, align)
    return expert_low_rank_gradients(dy, x, i["a"], i["b"], _SCALE, i["stripe"], slots)


def _experts_by_autograd(i: Inputs, _: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    dy, x, slots = _expert_rows(i, 16)
    a, b = (i[name].float().requires_grad_() for name in ("a", "b"))
    with_expert_low_rank_gradient(torch.zeros_like(dy), x, a, b, _SCALE, i["stripe"], slots).backward(dy)
    assert a.grad is not None and b.grad is not None
    return a.grad, b.grad


def _expert_products(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """da and db by way of the gradient of each expert's whole matrix."""
    chosen = torch.nn.functional.one_hot(i["ids"].long(), i["experts"]).to(i["x"].dtype)
    whole = torch.einsum("tie,tin,tk->enk", chosen, i["dy"], i["x"])
    b, rank = i["b"].view(i["experts"], -1, i["b"].shape[1]), i["b"].shape[1]
    a = i["a"].view(i["experts"], -1, rank, i["a"].shape[1])
    row = torch.arange(b.shape[1], device=b.device)
    of = row // i["stripe"] % 2 if i["stripe"] else row * 0
    da = [_SCALE * torch.einsum("enr,enk->erk", b[:, of == m], whole[:, of == m]) for m in range(a.shape[1])]
    db = _SCALE * torch.einsum("enk,enrk->enr", whole, a[:, of])
    return torch.stack(da, 1).flatten(0, 2), db.flatten(0, 1)


def _expert_magnitude(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what is added up; u and v were rounded to the dtype of x, twice."""
    da, db = _expert_products({**i, **{name: i[name].abs() for name in ("dy", "x", "a", "b")}})
    return da * 2 * i["rounding"], db * 2 * i["rounding"]


EXPERTS = OpSpec(
    name="expert_low_rank_gradients",
    make=_make_experts,
    run=_of_experts,
    variants={"alignments of experts": lambda i, _: _of_experts(i, 128), "the backward pass": _experts_by_autograd},
    reference=_expert_products,
    scale=_expert_magnitude,
    cases=(
        {"rows": 1, "K": 2, "N": 1, "experts": 1, "k": 1, "rank": 1, "matrices": 1, "groups": 1},
        {"rows": 30, "K": 40, "N": 1, "experts": 8, "k": 8, "rank": 16, "matrices": 2, "groups": 3},
        {"rows": 53, "K": 96, "N": 3, "experts": 16, "k": 3, "rank": 16, "matrices": 2, "groups": 7},
    ),
    space={
        "rows": (1, 2, 7, 20),
        "K": (1, 3, 16, 40),
        "N": (1, 2),
        "experts": (1, 2, 8, 13),
        "k": (1, 2),
        "rank": (1, 2, 16),
        "matrices": (1, 2),
        "groups": (1, 2, 5),
    },
    claims=("groups", "threads", "alignment", "strides", "alignments of experts", "the backward pass"),
    accuracy=4.0,
    row_inputs=("dy", "x", "ids"),
    group_sums=("output",),
    work=lambda c, size: Work(
        8.0 * c["rows"] * c["k"] * c["rank"] * (16 * c["N"] + c["K"]), size * c["experts"] * c["K"], backward=0
    ),
    vendor=_expert_products,
    bench=({"rows": 64, "K": 256, "N": 8, "experts": 16, "k": 4, "rank": 16, "matrices": 2, "groups": 8},),
)
SPECS = (MERGE, GRADIENT, EXPERTS)
