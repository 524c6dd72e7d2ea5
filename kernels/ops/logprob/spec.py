"""Specs of the log-probabilities: the vocabulary-sharded path of the sampler, and the fused one of the trainer."""

import torch

from kernels.ops.logprob import linear_logprob, vocab_logprob, vocab_nodes
from kernels.ops.matmul import matmul
from kernels.ops.truncate import exclude_padding
from kernels.spec import Inputs, OpSpec, Sharding, Work, offsets, spread


def _temperature(rows: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """From 1/2 to 2, with a row of exactly 1."""
    temperature = torch.exp2(2 * torch.rand(rows, generator=generator) - 1)
    temperature[0] = 1.0
    return temperature.to(device)


def _make_logits(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    rows, vocab = case["rows"], case["columns"] * case["leaves"]
    return {
        "logits": spread((rows, vocab), generator, device, dtype, octaves=4),
        "temperature": _temperature(rows, generator, device),
        "targets": torch.randint(0, vocab, (rows,), generator=generator).to(device),
        "leaves": case["leaves"],
    }


def _from_nodes(i: Inputs, nodes: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return vocab_logprob(nodes, logits.gather(1, i["targets"][:, None])[:, 0], i["temperature"])


def _vocab_reference(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    z = i["logits"] / i["temperature"][:, None]
    lse = z.logsumexp(1)
    return z.gather(1, i["targets"][:, None])[:, 0] - lse, lse


def _vocab_vendor(i: Inputs) -> torch.Tensor:
    return (i["logits"] / i["temperature"][:, None]).log_softmax(1).gather(1, i["targets"][:, None])


def _vocab_shard(i: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    part = i["logits"][:, shard.range(i["logits"].shape[1])]
    return {**i, "logits": part, "leaves": i["leaves"] // shard.size}


VOCAB = OpSpec(
    name="vocab_logprob",
    make=_make_logits,
    run=lambda i: _from_nodes(i, vocab_nodes(i["logits"], i["temperature"], i["leaves"]), i["logits"]),
    reference=_vocab_reference,
    # A logit of magnitude z carries an error of eps z through the division, the maximum and the exponential.
    scale=lambda i: (1 + (i["logits"] / i["temperature"][:, None]).abs().amax(1),) * 2,
    cases=(
        {"rows": 1, "columns": 1, "leaves": 1},
        {"rows": 19, "columns": 33, "leaves": 8},
        {"rows": 5, "columns": 100, "leaves": 16},
    ),
    space={"rows": (1, 2, 7, 20), "columns": (1, 2, 15, 16, 17, 40), "leaves": (1, 2, 4, 8, 16)},
    claims=("batch", "position", "padding", "shard", "threads", "alignment", "strides"),
    accuracy=2.0,
    dtypes=(torch.float32,),
    row_inputs=("logits", "temperature", "targets"),
    shardings=(
        Sharding(
            "vocabulary",
            most=lambda i: i["leaves"],
            split=_vocab_shard,
            run=lambda i: vocab_nodes(i["logits"], i["temperature"], i["leaves"]),
            join=lambda i, parts: _from_nodes(i, torch.cat(parts, 1), i["logits"]),
        ),
    ),
    work=lambda c, size: Work(
        4.0 * c["rows"] * c["columns"] * c["leaves"], 4.0 * c["rows"] * c["columns"] * c["leaves"], by_flops=False
    ),
    vendor=_vocab_vendor,
    describe=lambda c: f"rows {c['rows']}, vocabulary {c['columns'] * c['leaves']}, {c['leaves']} leaves",
    bench=({"rows": 512, "columns": 1024, "leaves": 8},),
)


def _make_linear(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    rows, vocab, n = case["rows"], case["columns"] * case["leaves"], case["leaf"] * case["leaves"]
    vocabulary = max(1, vocab - case["padding"])
    return {
        "x": spread((rows, n), generator, device, dtype, octaves=1),
        "head": spread((vocab, n), generator, device, dtype, octaves=1) * n**-0.5,
        "vocabulary": vocabulary,
        "targets": torch.randint(0, vocabulary, (rows,), generator=generator).to(device),
        "temperature": _temperature(rows, generator, device),
        "leaves": case["leaves"],
        "groups": offsets(rows, case["groups"], generator).to(device),
    }


def _linear(i: Inputs) -> torch.Tensor:
    of_rows = (i["targets"], i["temperature"], i["leaves"], i["groups"])
    return linear_logprob(i["x"], i["head"], *of_rows, vocabulary=i["vocabulary"])


def _linear_reference(i: Inputs) -> torch.Tensor:
    z = torch.einsum("rk,vk->rv", i["x"], i["head"][: i["vocabulary"]]) / i["temperature"][:, None]
    return (z - z.exp().sum(1, keepdim=True).log()).gather(1, i["targets"][:, None])[:, 0]


def _head_shard(i: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    rows = shard.range(i["head"].shape[0])
    return {**i, "head": i["head"][rows], "first_id": rows.start, "vocab_leaves": i["leaves"] // shard.size}


def _shard_nodes(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    logits = matmul(i["x"], i["head"], i["leaves"], out_dtype=torch.float32)
    exclude_padding(logits, i["vocabulary"], i["first_id"])
    return vocab_nodes(logits, i["temperature"], i["vocab_leaves"]), logits


def _join_nodes(i: Inputs, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    nodes, logits = (torch.cat(side, 1) for side in zip(*parts, strict=True))
    return _from_nodes(i, nodes, logits)[0]


LINEAR = OpSpec(
    name="linear_logprob",
    make=_make_linear,
    run=_linear,
    reference=_linear_reference,
    scale=lambda i: 1 + (i["x"].abs() @ i["head"][: i["vocabulary"]].abs().T / i["temperature"][:, None]).amax(1),
    cases=(
        {"rows": 1, "columns": 1, "leaf": 1, "leaves": 1, "groups": 1, "padding": 0},
        {"rows": 21, "columns": 12, "leaf": 10, "leaves": 8, "groups": 5, "padding": 0},
        {"rows": 40, "columns": 33, "leaf": 16, "leaves": 4, "groups": 8, "padding": 40},
    ),
    space={
        "rows": (1, 2, 7, 20),
        "columns": (1, 3, 16, 20),
        "leaf": (1, 5, 16),
        "leaves": (1, 2, 4, 8),
        "groups": (1, 2, 3, 5, 7, 8),
        "padding": (0, 1, 9),
    },
    claims=("batch", "position", "padding", "shard", "groups", "threads", "alignment", "strides"),
    accuracy=2.0,
    row_inputs=("x", "targets", "temperature"),
    shardings=(
        Sharding("vocabulary", most=lambda i: i["leaves"], split=_head_shard, run=_shard_nodes, join=_join_nodes),
    ),
    differentiable=("x", "head"),
    group_sums=("head",),
    gradient_accuracy=8.0,
    work=lambda c, size: Work(
        2.0 * c["rows"] * c["columns"] * c["leaf"] * c["leaves"] ** 2,
        size * (c["rows"] + c["columns"] * c["leaves"]) * c["leaf"] * c["leaves"],
        backward=3.0,
    ),
    vendor=lambda i: (
        (i["x"] @ i["head"][: i["vocabulary"]].T / i["temperature"][:, None])
        .log_softmax(1)
        .gather(1, i["targets"][:, None])[:, 0]
    ),
    describe=lambda c: f"rows {c['rows']}, vocabulary {c['columns'] * c['leaves']}, n {c['leaf'] * c['leaves']}",
    bench=({"rows": 512, "columns": 512, "leaf": 32, "leaves": 8, "groups": 8, "padding": 0},),
)
SPECS = (VOCAB, LINEAR)
