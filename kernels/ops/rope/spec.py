"""Spec of the rotary embedding."""

import numpy as np
import torch

from kernels.ops.rope import rope, rope_table
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
SPECS = (ROPE,)
