"""Spec of the weighted sum over a token's experts."""

import torch

from kernels.ops.combine import Mixture, combine, combine_add_norm
from kernels.ops.dispatch import Slots, dispatch
from kernels.ops.dispatch.spec import make_choices
from kernels.ops.rms_norm import add_rms_norm
from kernels.spec import Inputs, OpSpec, Sharding, Work, spread, tree_sum


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    made = make_choices({**case, "experts": case["leaves"] * case["extent"]}, generator, device)
    rows, k = made["ids"].shape
    return {
        "y": spread((rows, k, case["n"]), generator, device, dtype),
        "weights": torch.rand(rows, k, generator=generator).to(device),
        "leaves": case["leaves"],
        "first": 0,
        **made,
    }


def _slots(i: Inputs, align: int) -> Slots:
    return dispatch(i["ids"], i["first"], i["experts"], align, i["groups"])


def _mixture(i: Inputs, align: int) -> Mixture:
    """`y` [T, k, n] laid out as an expert's matmul would leave it; rows that are nobody's are NaN."""
    slots = _slots(i, align)
    mine = slots.of >= 0
    rows = torch.full((slots.capacity, i["y"].shape[2]), torch.nan, dtype=i["y"].dtype, device=i["y"].device)
    rows = rows.index_put((slots.of[mine].long(),), i["y"][mine])
    return Mixture(rows, i["weights"], i["ids"], slots, i["leaves"])


def _run(i: Inputs, align: int = 16, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return combine(*_mixture(i, align), out_dtype)


@torch.no_grad()
def _normed(i: Inputs, generator: torch.Generator) -> torch.Tensor:
    """Returns the sum that is added to nothing; added to something, sum and norm have the bits of the two ops."""
    mixture = _mixture(i, 16)
    tokens, n = len(i["ids"]), i["y"].shape[2]
    x, weight = (spread(shape, generator, i["y"].device, i["y"].dtype) for shape in ((tokens, n), (n,)))
    ours = combine_add_norm(x, mixture, weight, 1e-6)
    for mine, other in zip(ours, add_rms_norm(x, combine(*mixture), weight, 1e-6), strict=True):
        if not torch.equal(mine, other):
            raise AssertionError(f"combine_add_norm differs at {(mine != other).nonzero()[0].tolist()}")
    return combine_add_norm(torch.zeros_like(x), mixture, weight, 1e-6)[1]


def _split(i: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    mine = shard.range(i["experts"])
    return {**i, "experts": mine.stop - mine.start, "first": mine.start, "leaves": i["leaves"] // shard.size}


COMBINE = OpSpec(
    name="combine",
    make=_make,
    run=_run,
    reference=lambda i: torch.einsum("tk,tkn->tn", i["weights"], i["y"]),
    scale=lambda i: torch.einsum("tk,tkn->tn", i["weights"].abs(), i["y"].abs()),
    cases=(
        {"rows": 1, "n": 1, "leaves": 1, "extent": 1, "k": 1, "groups": 1},
        {"rows": 30, "n": 40, "leaves": 8, "extent": 1, "k": 8, "groups": 3},
        {"rows": 53, "n": 700, "leaves": 8, "extent": 16, "k": 8, "groups": 7},
    ),
    space={
        "rows": (1, 2, 7, 20),
        "n": (1, 3, 16, 40),
        "leaves": (1, 2, 4, 8),
        "extent": (1, 2, 5),
        "k": (1, 2, 5, 8),
        "groups": (1, 2),
    },
    claims=(
        "batch",
        "position",
        "padding",
        "alignments of experts",
        "normed",
        "shard",
        "threads",
        "alignment",
        "strides",
    ),
    accuracy=4.0,
    row_inputs=("y", "weights", "ids"),
    variants={"alignments of experts": lambda i, _: _run(i, 128), "normed": _normed},
    shardings=(
        Sharding(
            "experts",
            most=lambda i: i["leaves"],
            split=_split,
            run=lambda i: _run(i, out_dtype=torch.float32),
            join=tree_sum("y"),
        ),
    ),
    differentiable=("y", "weights"),
    gradient_accuracy=8.0,
    work=lambda c, size: Work(
        2.0 * c["rows"] * c["k"] * c["n"], size * c["rows"] * c["n"] * (1.0 + c["k"]), backward=2.0, by_flops=False
    ),
    vendor=lambda i: torch.einsum("tk,tkn->tn", i["weights"].to(i["y"].dtype), i["y"]),
    bench=({"rows": 1024, "n": 2048, "leaves": 8, "extent": 16, "k": 8, "groups": 8},),
)
SPECS = (COMBINE,)
