"""Spec of the normal numbers. A row is a stream of its own."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from kernels.ops.normal import normal
from kernels.spec import Inputs, OpSpec, Work

_NAME, _DEVIATION = 7, 0.02
_LAYERS = 256


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    seeds = torch.randint(2**31, (case["rows"],), generator=generator)
    return {"seeds": seeds.to(device), "n": case["n"]}


def _run(i: Inputs, more: int = 0) -> torch.Tensor:
    out = torch.empty(len(i["seeds"]), i["n"])
    for row, seed in zip(out, i["seeds"].tolist(), strict=True):
        row.copy_(normal((i["n"] + more,), seed, _NAME, _DEVIATION)[: i["n"]])
    return out


def _words(seed: int) -> Iterator[int]:
    """32 bits at a time, of numpy's Philox."""
    philox = np.random.Philox(key=[seed, _NAME])
    while True:
        word = int(philox.random_raw())
        yield from (word & 0xFFFFFFFF, word >> 32)


def _curve(x: np.longdouble) -> np.longdouble:
    return np.exp(-x * x / 2)


def _edges() -> list[np.longdouble]:
    """Returns where each layer ends, from 0 for the peak to the outermost, and last the width of the lowest with its
    tail unrolled."""
    outer = np.longdouble(3.6541528853610088)
    area = outer * _curve(outer) + math.sqrt(math.pi / 2) * math.erfc(float(outer) / math.sqrt(2))
    edges = [area / _curve(outer), outer]
    while len(edges) < _LAYERS:
        edges.append(np.sqrt(-2 * np.log(area / edges[-1] + _curve(edges[-1]))))
    return [np.longdouble(0), *reversed(edges)]


def _number(words: Iterator[int], edges: list[np.longdouble]) -> float:
    """One draw, from the definition."""
    while True:
        word = next(words)
        layer, sign, place = word % _LAYERS or _LAYERS, -1 if word & 256 else 1, word >> 9
        x = edges[layer] * place / 2**23
        if place < round(edges[layer - 1] / edges[layer] * 2**23):
            return float(sign * x)
        if layer == _LAYERS:  # the lowest: beyond its edge
            sign = -1 if place & 256 else 1
            while True:
                far, chance = (-np.log1p(-np.longdouble(next(words) >> 8) / 2**24) for _ in range(2))
                if 2 * chance > (far / edges[-2]) ** 2:
                    return float(sign * (edges[-2] + far / edges[-2]))
        above, below = _curve(edges[layer - 1]), _curve(edges[layer])
        if below + (above - below) * (next(words) >> 8) / 2**24 < _curve(x):
            return float(sign * x)


def _reference(i: Inputs) -> torch.Tensor:
    edges, deviation = _edges(), float(np.float32(_DEVIATION))
    rows = [[_number(words, edges) for _ in range(i["n"])] for words in map(_words, i["seeds"].tolist())]
    return torch.tensor(rows, dtype=torch.float64).view(-1, i["n"]) * deviation


NORMAL = OpSpec(
    name="normal",
    make=_make,
    run=_run,
    reference=_reference,
    cases=({"rows": 1, "n": 1}, {"rows": 5, "n": 333}, {"rows": 2, "n": 20000}),
    space={"rows": (1, 2, 7), "n": (1, 2, 9, 100)},
    claims=("batch", "position", "threads", "alignment", "strides", "length"),
    accuracy=2.0,
    dtypes=(torch.float32,),
    devices=("cpu",),
    row_inputs=("seeds",),
    variants={"length": lambda i, generator: _run(i, more=int(torch.randint(1, 50, (), generator=generator)))},
    work=lambda c, size: Work(10.0 * c["rows"] * c["n"], 4.0 * c["rows"] * c["n"], by_flops=False),
    vendor=lambda i: torch.randn(len(i["seeds"]), i["n"]),
    bench=({"rows": 1, "n": 1 << 20},),
)
SPECS = (NORMAL,)
