"""Spec of the rotary embedding."""

import numpy as np
import torch

from kernels.ops.rope import cos_sin, rope, rope_table
from kernels.spec import Inputs, OpSpec, Sharding, Work, concatenated, spread

_THETA = 10000.0
_POSITIONS = 4096


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
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


def _reference(i: Inputs) -> torch.Tensor:
    a, b = i["x"].chunk(2, -1)
    turned = torch.complex(a, b) * _turn(i)
    return torch.cat([turned.real, turned.imag], -1)


def _scale(i: Inputs) -> torch.Tensor:
    a, b = i["x"].chunk(2, -1)
    return torch.cat([torch.hypot(a, b)] * 2, -1)


def _vendor(i: Inputs) -> torch.Tensor:
    cosine, sine = i["cosine"][i["positions"]][:, None], i["sine"][i["positions"]][:, None]
    a, b = i["x"].chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


def _work(case, size: int) -> Work:  # type: ignore[no-untyped-def]
    elements = float(case["rows"] * case["heads"] * case["head_dim"])
    return Work(3 * elements, 2 * size * elements, backward=1.0, by_flops=False)


ROPE = OpSpec(
    name="rope",
    make=_make,
    run=lambda i: rope(i["x"], i["cosine"], i["sine"], i["positions"]),
    reference=_reference,
    scale=_scale,
    cases=({"rows": 1, "heads": 1, "head_dim": 2}, {"rows": 19, "heads": 8, "head_dim": 64}),
    space={"rows": (1, 2, 7, 20), "heads": (1, 2, 4, 8), "head_dim": (2, 6, 16, 32, 64)},
    claims=("batch", "position", "padding", "shard", "threads", "alignment", "strides"),
    accuracy=2.0,
    row_inputs=("x", "positions"),
    shardings=(
        Sharding(
            "heads",
            most=lambda i: i["x"].shape[1],
            split=lambda i, shard: {**i, "x": i["x"][:, shard.range(i["x"].shape[1])]},
            join=concatenated(1),
        ),
    ),
    differentiable=("x",),
    gradient_accuracy=2.0,
    contiguous=("cosine", "sine", "positions"),
    work=_work,
    vendor=_vendor,
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
SPECS = (ROPE, COS_SIN)
