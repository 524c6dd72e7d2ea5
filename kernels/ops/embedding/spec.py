"""Spec of the embedding."""

import torch

from kernels.ops.embedding import embedding
from kernels.spec import Inputs, OpSpec, Sharding, Work, offsets, spread, tree_sum


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    vocab = 8 * case["eighth"]
    weight = spread((vocab, case["n"]), generator, device, dtype)
    minus_zero = torch.rand(weight.shape, generator=generator) < 0.25
    weight[minus_zero.to(device)] = -0.0  # a gather must give +0 for it, or a tree over shards would differ
    return {
        # Half of the vocabulary, so that ids repeat inside a group, across groups, and never come.
        "ids": torch.randint(0, vocab // 2, (case["rows"],), generator=generator).mul(2).to(device),
        "weight": weight,
        "groups": offsets(case["rows"], case["groups"], generator).to(device),
        "first_id": 0,
        "out_dtype": dtype,
    }


def _run(i: Inputs) -> torch.Tensor:
    return embedding(i["ids"], i["weight"], first_id=i["first_id"], groups=i["groups"], out_dtype=i["out_dtype"])


def _split(i: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    part = shard.range(i["weight"].shape[0])
    return {**i, "weight": i["weight"][part], "first_id": i["first_id"] + part.start}


def _reference(i: Inputs) -> torch.Tensor:
    chosen = i["ids"][:, None] == i["first_id"] + torch.arange(i["weight"].shape[0])
    return chosen.double() @ i["weight"]


EMBEDDING = OpSpec(
    name="embedding",
    make=_make,
    run=_run,
    reference=_reference,
    cases=(
        {"rows": 1, "eighth": 1, "n": 1, "groups": 1},
        {"rows": 200, "eighth": 4, "n": 33, "groups": 13},
        {"rows": 60, "eighth": 8, "n": 16, "groups": 40},
    ),
    space={"rows": (1, 2, 9, 40), "eighth": (1, 2), "n": (1, 2, 15, 16, 17, 40), "groups": (1, 2, 3, 5, 6, 7, 8, 11)},
    claims=("batch", "position", "columns", "shard", "groups", "threads", "alignment", "strides"),
    accuracy=0.0,
    row_inputs=("ids",),
    columns=lambda i, n: {**i, "weight": i["weight"][:, n]},
    width=lambda i: i["weight"].shape[1],
    shardings=(Sharding("vocabulary", most=lambda i: 8, split=_split, join=tree_sum("weight")),),
    differentiable=("weight",),
    group_sums=("weight",),
    gradient_accuracy=2.0,
    work=lambda c, size: Work(0.0, 2.0 * size * c["rows"] * c["n"], by_flops=False),
    describe=lambda c: f"tokens {c['rows']}, vocabulary {8 * c['eighth']}, n {c['n']}",
    vendor=lambda i: torch.nn.functional.embedding(i["ids"], i["weight"]),
    bench=({"rows": 2048, "eighth": 4096, "n": 512, "groups": 8},),
)
SPECS = (EMBEDDING,)
