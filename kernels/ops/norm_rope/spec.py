"""Spec of norm_rope."""

import torch

from kernels.ops.norm_rope import norm_rope
from kernels.ops.rms_norm import rms_norm
from kernels.ops.rope import rope, rope_table
from kernels.spec import Inputs, OpSpec, Sharding, Work, concatenated, offsets, spread


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    D, kv = case["head_dim"], case["kv_heads"]
    inputs = {
        "x": spread((case["rows"], kv * (case["group"] + 1), D), generator, device, dtype),
        "positions": torch.randint(0, 300, (case["rows"],), generator=generator, dtype=torch.int32).to(device),
        "q_weight": spread((D,), generator, device, dtype, octaves=1),
        "k_weight": spread((D,), generator, device, dtype, octaves=1),
        "kv_heads": kv,
        "groups": offsets(case["rows"], case["groups"], generator).to(device),
        "dtype": dtype,
    }
    cosine, sine = (t.to(device) for t in rope_table(300, D, 10000.0))
    return {**inputs, "cosine": cosine, "sine": sine}


def _run(i: Inputs) -> tuple[torch.Tensor, ...]:
    table, weights = (i["cosine"], i["sine"]), (i["q_weight"], i["k_weight"])
    return norm_rope(i["x"], weights, 1e-6, table, i["positions"], i["kv_heads"], groups=i["groups"])


def _one_after_the_other(i: Inputs, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    heads = i["x"].shape[1] - i["kv_heads"]
    parts = [i["x"][:, :heads], i["x"][:, heads:]]
    weights = (i["q_weight"], i["k_weight"])
    parts = [rms_norm(p, w, 1e-6, groups=i["groups"]) for p, w in zip(parts, weights, strict=True)]
    return tuple(rope(p, i["cosine"], i["sine"], i["positions"]) for p in parts)


def _reference(i: Inputs) -> tuple[torch.Tensor, ...]:
    heads, at = i["x"].shape[1] - i["kv_heads"], i["positions"].long()
    out = []
    for x, weight in ((i["x"][:, :heads], i["q_weight"]), (i["x"][:, heads:], i["k_weight"])):
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        a, b = x.chunk(2, -1)
        c, s = i["cosine"][at][:, None], i["sine"][at][:, None]
        out.append(torch.cat([a * c - b * s, b * c + a * s], -1))
    return tuple(out)


def _scale(i: Inputs) -> tuple[torch.Tensor, ...]:
    """The length of the turned pair, which the norm rounded to the dtype of x before the turn."""
    rounding = torch.finfo(i["dtype"]).eps / torch.finfo(torch.float32).eps
    out = []
    for y in _reference(i):
        a, b = y.chunk(2, -1)
        out.append(torch.cat([torch.hypot(a, b)] * 2, -1) * rounding)
    return tuple(out)


def _shard(i: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    heads = i["x"].shape[1] - i["kv_heads"]
    q, k = i["x"][:, :heads][:, shard.range(heads)], i["x"][:, heads:][:, shard.range(i["kv_heads"])]
    return {**i, "x": torch.cat([q, k], 1), "kv_heads": i["kv_heads"] // shard.size}


def _work(c, size: int) -> Work:  # type: ignore[no-untyped-def]
    elements = float(c["rows"] * c["kv_heads"] * (c["group"] + 1) * c["head_dim"])
    return Work(10 * elements, 2 * size * elements, by_flops=False)


def _case(rows: int, kv_heads: int, group: int, head_dim: int, groups: int) -> dict[str, int]:
    return dict(rows=rows, kv_heads=kv_heads, group=group, head_dim=head_dim, groups=groups)


NORM_ROPE = OpSpec(
    name="norm_rope",
    make=_make,
    run=_run,
    reference=_reference,
    scale=_scale,
    cases=(_case(1, 1, 1, 16, 1), _case(21, 2, 3, 32, 5), _case(9, 8, 2, 64, 3), _case(40, 1, 4, 128, 2)),
    space={
        "rows": (1, 2, 7, 20),
        "kv_heads": (1, 2, 4),
        "group": (1, 2, 3),
        "head_dim": (16, 32, 64),
        "groups": (1, 2, 3, 5),
    },
    claims=("batch", "position", "padding", "shard", "groups", "threads", "alignment", "strides", "unfused"),
    accuracy=4.0,
    row_inputs=("x", "positions"),
    shardings=(Sharding("heads", most=lambda i: i["kv_heads"], split=_shard, join=concatenated(1)),),
    variants={"unfused": _one_after_the_other},
    differentiable=("x", "q_weight"),  # the outputs[0] that is differentiated is q
    group_sums=("q_weight",),
    gradient_accuracy=6.0,
    contiguous=("groups", "q_weight", "k_weight", "cosine", "sine", "positions"),
    work=_work,
    vendor=lambda i: _reference(i)[0],
    bench=(_case(512, 4, 4, 64, 8),),
)
SPECS = (NORM_ROPE,)
