"""Spec of the sampler. The reference has a Philox of its own."""

import numpy as np
import torch

from kernels.ops.sample import gumbel_argmax
from kernels.spec import Inputs, OpSpec, Sharding, Work

_M = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def _make(case, generator, device, dtype) -> Inputs:  # type: ignore[no-untyped-def]
    rows, n = case["rows"], case["n"]
    words = torch.randint(-(2**63), 2**63 - 1, (2, rows), generator=generator)
    inputs = {
        # Multiples of 1/2, so that greedy rows are full of ties.
        "logits": (torch.randn(rows, n, generator=generator) * 4).round().div(2).to(dtype),
        "temperature": torch.exp2(2 * torch.rand(rows, generator=generator) - 1),
        "seeds": words[0],
        "positions": words[1].abs() >> torch.randint(10, 60, (rows,), generator=generator),
        "greedy": (torch.rand(rows, generator=generator) < 0.3).to(torch.uint8),
    }
    return {**{k: v.to(device) for k, v in inputs.items()}, "first_id": 0}


def _run(i: Inputs) -> tuple[torch.Tensor, ...]:
    return gumbel_argmax(i["logits"], i["temperature"], i["seeds"], i["positions"], i["greedy"], i["first_id"])


def _words(seed: int, position: int, ids: np.ndarray) -> np.ndarray:
    """Word id mod 4 of Philox4x32-10 with key = seed and counter = (id / 4, position low, position high, 0)."""
    high = [np.uint64(seed >> shift & 0xFFFFFFFF) for shift in (0, 32)]
    c = [(ids // 4).astype(np.uint64), *(np.full(len(ids), position >> s & 0xFFFFFFFF, np.uint64) for s in (0, 32, 64))]
    for turn in range(10):
        key = [np.uint64(int(k) + turn * w & 0xFFFFFFFF) for k, w in zip(high, _WEYL, strict=True)]
        a, b = _M[0] * c[0], _M[1] * c[2]
        c = [b >> np.uint64(32) ^ c[1] ^ key[0], b & _LOW, a >> np.uint64(32) ^ c[3] ^ key[1], a & _LOW]
    return np.choose(ids % 4, c)


def _reference(i: Inputs) -> tuple[torch.Tensor, ...]:
    scores = []
    for r in range(i["logits"].shape[0]):
        z = (i["logits"][r] / i["temperature"][r]).numpy()
        if not i["greedy"][r]:
            bits = _words(int(i["seeds"][r]), int(i["positions"][r]), i["first_id"] + np.arange(len(z)))
            top, low = (bits >> np.uint64(8)).astype("f8"), (bits & np.uint64(255)).astype("f8")
            u = np.where(top > 0, (top + 0.5) * 2.0**-24, low * 2.0**-32 + 2.0**-33)
            z = z - np.log(-np.log1p(-u))
        scores.append(torch.from_numpy(z))
    score, best = torch.stack(scores).max(1)
    best = torch.tensor([int((s == m).nonzero()[0]) for s, m in zip(scores, score, strict=True)])
    return score, best + i["first_id"], i["logits"].gather(1, best[:, None])[:, 0]


def _most(i: Inputs) -> int:
    size = 1
    while i["logits"].shape[1] % (8 * size) == 0:  # a shard starts at a multiple of 4
        size *= 2
    return size


def _split(i: Inputs, shard) -> Inputs:  # type: ignore[no-untyped-def]
    part = shard.range(i["logits"].shape[1])
    return {**i, "logits": i["logits"][:, part], "first_id": i["first_id"] + part.start}


def _highest(i: Inputs, parts: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    best = parts[0]
    for part in parts[1:]:
        higher = part[0] > best[0]
        best = tuple(torch.where(higher, new, old) for new, old in zip(part, best, strict=True))
    return best


def _vendor(i: Inputs) -> torch.Tensor:
    noise = torch.empty_like(i["logits"]).exponential_().log()
    return (i["logits"] / i["temperature"][:, None] - noise).argmax(1)


SAMPLE = OpSpec(
    name="gumbel_argmax",
    make=_make,
    run=_run,
    reference=_reference,
    scale=lambda i: (8 + (i["logits"] / i["temperature"][:, None]).abs().amax(1), torch.ones(()), torch.ones(())),
    cases=({"rows": 1, "n": 1}, {"rows": 30, "n": 96}, {"rows": 9, "n": 1023}, {"rows": 20, "n": 64}),
    space={"rows": (1, 2, 7, 20), "n": (1, 2, 3, 4, 7, 16, 32, 37, 96)},
    claims=("batch", "position", "padding", "shard", "threads", "alignment", "strides"),
    accuracy=1.0,
    dtypes=(torch.float32,),
    row_inputs=("logits", "temperature", "seeds", "positions", "greedy"),
    shardings=(Sharding("vocabulary", most=_most, split=_split, join=_highest),),
    contiguous=("temperature", "seeds", "positions", "greedy"),
    work=lambda c, size: Work(50.0 * c["rows"] * c["n"], 4.0 * c["rows"] * c["n"], by_flops=False),
    vendor=_vendor,
    bench=({"rows": 64, "n": 32768},),
)
SPECS = (SAMPLE,)
