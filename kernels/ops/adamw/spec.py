"""Spec of AdamW. The op writes in place; `run` works on copies."""

import torch

from kernels.ops.adamw import adamw
from kernels.spec import Inputs, OpSpec, Sharding, Work, concatenated, spread

_STATE = ("weight", "grad", "first", "second")
_HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.37}


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    state = {name: spread((case["n"],), generator, device, dtype) for name in _STATE}
    return {**state, "second": state["second"].square(), "step": case["step"]}


def _run(i: Inputs) -> tuple[torch.Tensor, ...]:
    weight, first, second = (
        i[name].clone(memory_format=torch.contiguous_format) for name in ("weight", "first", "second")
    )
    adamw(weight, i["grad"], first, second, step=i["step"], **_HYPER)
    return weight, first, second


def _reference(i: Inputs) -> tuple[torch.Tensor, ...]:
    b1, b2 = _HYPER["betas"]
    g = i["grad"] * _HYPER["grad_scale"]
    first, second = b1 * i["first"] + (1 - b1) * g, b2 * i["second"] + (1 - b2) * g**2
    denominator = (second / (1 - b2 ** i["step"])).sqrt() + _HYPER["eps"]
    update = first / (1 - b1 ** i["step"]) / denominator
    return i["weight"] * (1 - _HYPER["lr"] * _HYPER["weight_decay"]) - _HYPER["lr"] * update, first, second


def _scale(i: Inputs) -> tuple[torch.Tensor, ...]:
    """Magnitudes before cancellation. 1 - beta comes from a beta that was rounded: an error of eps / (1 - beta)."""
    b1, b2 = _HYPER["betas"]
    g = (i["grad"] * _HYPER["grad_scale"]).abs()
    first = b1 * i["first"].abs() + (1 - b1) * g * (1 + 1 / (1 - b1))
    second = b2 * i["second"] + (1 - b2) * g**2 * (1 + 1 / (1 - b2))
    update = first / (1 - b1 ** i["step"]) / (_reference(i)[2] / (1 - b2 ** i["step"])).sqrt()
    return i["weight"].abs() + _HYPER["lr"] * update * (1 + second / _reference(i)[2]), first, second


def _vendor(i: Inputs) -> object:
    if "optimizer" not in i:  # state is made once and is no part of the time
        parameter = torch.nn.Parameter(i["weight"].clone())
        parameter.grad = i["grad"]
        keys = {k: _HYPER[k] for k in ("lr", "betas", "eps", "weight_decay")}
        i["optimizer"] = torch.optim.AdamW([parameter], fused=True, **keys)
    return i["optimizer"].step()


ADAMW = OpSpec(
    name="adamw",
    make=_make,
    run=_run,
    reference=_reference,
    scale=_scale,
    cases=({"n": 1, "step": 1}, {"n": 1000, "step": 1}, {"n": 4096, "step": 1000}),
    space={"n": (1, 7, 16, 33, 64), "step": (1, 2, 10, 100000)},
    claims=("batch", "position", "padding", "shard", "threads", "alignment", "strides"),
    accuracy=2.0,
    dtypes=(torch.float32,),
    row_inputs=_STATE,
    shardings=(
        Sharding(
            "elements",
            most=lambda i: i["weight"].shape[0],
            split=lambda i, shard: {**i, **{n: i[n][shard.range(i[n].shape[0])] for n in _STATE}},
            join=concatenated(0),
        ),
    ),
    contiguous=(),
    timed=lambda i: adamw(*(i[name] for name in _STATE), step=i["step"], **_HYPER),
    work=lambda c, size: Work(15.0 * c["n"], 28.0 * c["n"], by_flops=False),
    vendor=_vendor,
    bench=({"n": 1 << 20, "step": 10},),
)
SPECS = (ADAMW,)
