"""Specs of norm_rope: with norms, without (rope alone), and of the table that it reads."""

import numpy as np
import torch

from kernels.ops.norm_rope import Stored, cos_sin, norm_rope, rope_table
from kernels.ops.rms_norm import rms_norm
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
    return norm_rope(torch.cat(parts, 1), None, 0.0, (i["cosine"], i["sine"]), i["positions"], i["kv_heads"])


def _stored(i: Inputs, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Returns q, and k from the rows that it was stored in, among others that must stay; the values beside them are checked
    here."""
    x, kv = i["x"].detach(), i["kv_heads"]
    tokens, _, D = x.shape
    slots = torch.randperm(2 * tokens + 3, generator=generator)[:tokens].to(x.device)
    keys, values = (torch.full((2 * tokens + 3, kv, D), torch.nan, dtype=x.dtype, device=x.device) for _ in range(2))
    given = spread((tokens, 2 * kv, D), generator, x.device, x.dtype)[:, kv:]
    table, weights = (i["cosine"], i["sine"]), (i["q_weight"].detach(), i["k_weight"].detach())
    q, k = norm_rope(
        x, weights, 1e-6, table, i["positions"], kv, groups=i["groups"], stored=Stored(keys, values, slots, given)
    )
    others = torch.ones(len(keys), dtype=torch.bool, device=x.device).index_fill(0, slots, False)
    if not (torch.equal(values[slots], given) and torch.equal(keys[slots], k)):
        raise AssertionError("norm_rope stored other values, or other keys than it returned")
    if not (keys[others].isnan().all() and values[others].isnan().all()):
        raise AssertionError("norm_rope wrote a row that is nobody's")
    return q, keys[slots]


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
    """Returns the length of the turned pair, which the norm rounded to the dtype of x before the turn."""
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
    claims=("batch", "position", "padding", "shard", "groups", "threads", "alignment", "strides", "unfused", "stored"),
    accuracy=4.0,
    row_inputs=("x", "positions"),
    shardings=(Sharding("heads", most=lambda i: i["kv_heads"], split=_shard, join=concatenated(1)),),
    variants={"unfused": _one_after_the_other, "stored": _stored},
    differentiable=("x", "q_weight"),  # the outputs[0] that is differentiated is q
    group_sums=("q_weight",),
    gradient_accuracy=6.0,
    contiguous=("groups", "q_weight", "k_weight", "cosine", "sine", "positions"),
    work=_work,
    vendor=lambda i: _reference(i)[0],
    bench=(_case(512, 4, 4, 64, 8),),
)


_THETA = 10000.0
_POSITIONS = 4096


def _make_rope(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    cosine, sine = rope_table(_POSITIONS, case["head_dim"], _THETA)
    positions = torch.randint(0, _POSITIONS, (case["rows"],), generator=generator, dtype=torch.int32)
    return {
        "x": spread((case["rows"], case["heads"], case["head_dim"]), generator, device, dtype),
        "cosine": cosine.to(device),
        "sine": sine.to(device),
        "positions": positions.to(device),
    }


def _turn(i: Inputs) -> torch.Tensor:
    """e^(i angle) of each token from the definition, not from the table; complex [T, 1, head_dim / 2]."""
    half = i["x"].shape[-1] // 2
    frequency = np.longdouble(_THETA) ** (-np.arange(half, dtype=np.longdouble) / half)
    angle = i["positions"].numpy().astype(np.longdouble)[:, None] * frequency
    cosine, sine = (torch.from_numpy(f(angle).astype("f8")) for f in (np.cos, np.sin))
    return torch.complex(cosine, sine)[:, None]


def _rope_reference(i: Inputs) -> torch.Tensor:
    a, b = i["x"].chunk(2, -1)
    turned = torch.complex(a, b) * _turn(i)
    return torch.cat([turned.real, turned.imag], -1)


def _rope_scale(i: Inputs) -> torch.Tensor:
    a, b = i["x"].chunk(2, -1)
    return torch.cat([torch.hypot(a, b)] * 2, -1)


def _rope_vendor(i: Inputs) -> torch.Tensor:
    cosine, sine = i["cosine"][i["positions"]][:, None], i["sine"][i["positions"]][:, None]
    a, b = i["x"].chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


def _rope_work(case, size: int) -> Work:  # type: ignore[no-untyped-def]
    elements = float(case["rows"] * case["heads"] * case["head_dim"])
    return Work(3 * elements, 2 * size * elements, backward=1.0, by_flops=False)


def _rope(i: Inputs) -> torch.Tensor:
    """Rope alone, of both kinds of heads."""
    q, k = norm_rope(i["x"], None, 0.0, (i["cosine"], i["sine"]), i["positions"], i["x"].shape[1] // 2)
    return torch.cat([q, k], 1)


ROPE = OpSpec(
    name="rope",
    make=_make_rope,
    run=_rope,
    reference=_rope_reference,
    scale=_rope_scale,
    cases=(
        {"rows": 1, "heads": 2, "head_dim": 2},
        {"rows": 19, "heads": 8, "head_dim": 64},
        {"rows": 3, "heads": 16, "head_dim": 16},
    ),
    space={"rows": (1, 2, 7, 20), "heads": (2, 3, 4, 8), "head_dim": (2, 4, 16, 32, 64)},
    claims=("batch", "position", "padding", "shard", "threads", "alignment", "strides"),
    accuracy=2.0,
    row_inputs=("x", "positions"),
    shardings=(
        Sharding(
            "heads",
            most=lambda i: i["x"].shape[1] // 2,
            split=lambda i, shard: {**i, "x": i["x"][:, shard.range(i["x"].shape[1])]},
            join=concatenated(1),
        ),
    ),
    differentiable=("x",),
    gradient_accuracy=2.0,
    contiguous=("cosine", "sine", "positions"),
    work=_rope_work,
    vendor=_rope_vendor,
    bench=({"rows": 2048, "heads": 16, "head_dim": 64},),
)


def _angles(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    """Of every size up to 2^20, the first 0."""
    octave = torch.randint(-30, 21, (case["rows"], case["n"]), generator=generator)
    angles = torch.rand(octave.shape, generator=generator, dtype=torch.float64).ldexp(octave)
    angles[:, 0] = 0
    return {"angles": angles.to(device)}


def _cos_sin(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    wide = i["angles"].numpy().astype(np.longdouble)
    cosine, sine = (torch.from_numpy(f(wide).astype("f8")) for f in (np.cos, np.sin))
    return cosine, sine


COS_SIN = OpSpec(
    name="cos_sin",
    make=_angles,
    run=lambda i: cos_sin(i["angles"]),
    reference=_cos_sin,
    cases=({"rows": 1, "n": 1}, {"rows": 19, "n": 64}, {"rows": 300, "n": 333}),
    space={"rows": (1, 2, 7, 20), "n": (1, 2, 8, 15, 16, 17, 40)},
    claims=("batch", "position", "padding", "threads", "alignment", "strides"),
    accuracy=0.5,  # rounded correctly
    dtypes=(torch.float32,),
    devices=("cpu",),
    row_inputs=("angles",),
    work=lambda c, size: Work(250.0 * c["rows"] * c["n"], 16.0 * c["rows"] * c["n"]),
    vendor=lambda i: (i["angles"].cos().float(), i["angles"].sin().float()),
    bench=({"rows": 4096, "n": 64},),
)
SPECS = (NORM_ROPE, ROPE, COS_SIN)
