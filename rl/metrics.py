"""How far the trainer's and the sampler's log-probabilities of the same response tokens are apart.

In samebit they are the same bytes, so every metric below sits on its ideal value at every step. "Differs" is decided on
the bit patterns alone, with no tolerance: -0.0 and 0.0 differ, two NaNs with the same bits are equal.

All arrays are [R], one entry per response token of the batch; log-probabilities are float32, in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

# t, r: log-probabilities of trainer and rollout; d = t - r; w = e^d; R tokens
FORMULAS: Mapping[str, tuple[str, float]] = MappingProxyType(
    {
        "divergence/tokens_nonzero": ("number of tokens with bits(t) ≠ bits(r)", 0.0),
        "divergence/tokens_nonzero_frac": ("tokens_nonzero / R", 0.0),
        "divergence/seqs_nonzero": ("number of samples with such a token", 0.0),
        "divergence/logprob_abs_diff_mean": ("mean |d|", 0.0),
        "divergence/logprob_abs_diff_max": ("max |d|", 0.0),
        "divergence/kl_k1": ("mean (−d)", 0.0),
        "divergence/kl_k3": ("mean (e^d − d − 1)", 0.0),
        "divergence/mult_prob_error": ("mean e^|d|", 1.0),
        "divergence/prob_abs_diff_mean": ("mean |e^t − e^r|", 0.0),
        "divergence/prob_abs_diff_max": ("max |e^t − e^r|", 0.0),
        "divergence/ratio_min": ("min e^d", 1.0),
        "divergence/ratio_mean": ("mean e^d", 1.0),
        "divergence/ratio_max": ("max e^d", 1.0),
        "divergence/pearson": ("correlation of e^t and e^r; 1 if all bits are equal", 1.0),
        "divergence/ess": ("(Σ w)² / (R · Σ w²), w = e^d", 1.0),
    }
)
"""Metric name -> (formula, ideal value); d = trainer minus rollout log-probability, over response tokens."""

GAPS = (0.0, *(float(f"{m}e{e}") for e in range(-9, 2) for m in (1, 3)))
"""Lower edges of the classes of |d| in nats, two a decade; the last one holds what is not finite, too."""
POSITIONS = (0, *(2**i for i in range(24)))
"""Lower edges of the classes of a token's position in its response."""
PROBABILITIES = (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99)
"""Lower edges of the classes of e^r, the probability that a token was drawn with."""
EQUAL = "equal bits"


def bits(logprobs: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Returns the bit patterns [R] of float32 values [R]. Another dtype is an error: a cast would hide a difference."""
    if logprobs.dtype != np.float32:
        raise TypeError(f"log-probabilities must be float32, got {logprobs.dtype}")
    return np.ascontiguousarray(logprobs).view(np.uint32)


def differs(trainer: NDArray[np.float32], rollout: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns True [R] where the two bit patterns are not the same."""
    if trainer.ndim != 1 or trainer.shape != rollout.shape:
        raise ValueError(f"trainer {trainer.shape} and rollout {rollout.shape} log-probabilities must both be [R]")
    return bits(trainer) != bits(rollout)


def difference(trainer: NDArray[np.float32], rollout: NDArray[np.float32]) -> NDArray[np.float64]:
    """Computes d = t - r [R] in nats; 0 where the bits are equal, so that -inf on both sides is no gap."""
    with np.errstate(all="ignore"):
        return np.where(differs(trainer, rollout), trainer.astype(np.float64) - rollout.astype(np.float64), 0.0)


def divergence(
    trainer: NDArray[np.float32], rollout: NDArray[np.float32], sequence: NDArray[np.integer]
) -> dict[str, float]:
    """Computes the metrics of `FORMULAS`, plus `divergence/tokens_compared` = R; `sequence` is the sample of each token.

    Computed in float64. Equal bits are d = 0, so -inf on both sides is no gap. With R = 0 every metric is ideal: nothing
    differs, and tokens_compared says that nothing was compared. A gap of ±inf or a NaN is passed on, not hidden.
    """
    different = differs(trainer, rollout)
    if sequence.shape != trainer.shape:
        raise ValueError(f"sequence {sequence.shape} must be one sample index per token {trainer.shape}")
    tokens = trainer.size
    if not different.any():
        return {"divergence/tokens_compared": float(tokens)} | {name: ideal for name, (_, ideal) in FORMULAS.items()}

    d = difference(trainer, rollout)
    with np.errstate(all="ignore"):
        p, q = np.exp(trainer.astype(np.float64)), np.exp(rollout.astype(np.float64))
        moved = np.where(different, np.abs(p - q), 0.0)
        ratio = np.exp(d)
        weight = np.exp(d - d.max())  # the scale cancels in ess; this one cannot overflow
        metrics = {
            "divergence/tokens_compared": tokens,
            "divergence/tokens_nonzero": np.count_nonzero(different),
            "divergence/tokens_nonzero_frac": np.count_nonzero(different) / tokens,
            "divergence/seqs_nonzero": np.unique(sequence[different]).size,
            "divergence/logprob_abs_diff_mean": np.abs(d).mean(),
            "divergence/logprob_abs_diff_max": np.abs(d).max(),
            "divergence/kl_k1": 0.0 - d.mean(),
            "divergence/kl_k3": (np.expm1(d) - d).mean(),  # expm1: e^d - 1 without cancellation at small d
            "divergence/mult_prob_error": np.exp(np.abs(d)).mean(),
            "divergence/prob_abs_diff_mean": moved.mean(),
            "divergence/prob_abs_diff_max": moved.max(),
            "divergence/ratio_min": ratio.min(),
            "divergence/ratio_mean": ratio.mean(),
            "divergence/ratio_max": ratio.max(),
            "divergence/pearson": _pearson(p, q),
            "divergence/ess": weight.sum() ** 2 / (tokens * np.square(weight).sum()),
        }
    return {name: float(value) for name, value in metrics.items()}


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Correlation of x and y [R]; NaN where one of them is constant, since it is not defined there."""
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt(np.square(x).sum() * np.square(y).sum()))


def profile(
    trainer: NDArray[np.float32], rollout: NDArray[np.float32], place: NDArray[np.integer]
) -> dict[str, dict[str, Any]]:
    """Sorts the tokens of a step into classes, each named by its lower edge; a class without tokens is left out.

        divergence/by_gap          of |d| (GAPS), or EQUAL: number of tokens
        divergence/by_position     of `place` [R], the index of a token in its response (POSITIONS), and
        divergence/by_probability  of e^r (PROBABILITIES): [tokens, tokens that differ, sum of |d|, largest |d|]

    Added up over steps they say where gaps lie, and need no token of any step to be kept.
    """
    different, gap = differs(trainer, rollout), np.abs(difference(trainer, rollout))
    sizes = np.where(different, np.digitize(gap, GAPS), 0)

    def classes(values: NDArray[Any], edges: Sequence[float]) -> dict[str, list[float]]:
        found, out = np.digitize(values, edges), {}
        for c in np.unique(found):
            here = found == c
            counts = int(here.sum()), int(different[here].sum())
            out[f"{edges[c - 1]:g}"] = [*counts, float(gap[here].sum()), float(gap[here].max())]
        return out

    chances = np.nan_to_num(np.exp(rollout.astype(np.float64)))
    return {
        "divergence/by_gap": {
            f"{GAPS[c - 1]:g}" if c else EQUAL: int(n)
            for c, n in zip(*np.unique(sizes, return_counts=True), strict=True)
        },
        "divergence/by_position": classes(place, POSITIONS),
        "divergence/by_probability": classes(chances, PROBABILITIES),
    }


Badness = tuple[float, bool, float]
"""(|d|, whether the bits differ, -r) of a token: the largest is the worst."""


def worst(trainer: NDArray[np.float32], rollout: NDArray[np.float32]) -> tuple[Badness, int]:
    """Finds the token with the largest |d| (what is not finite is larger than all), then one that differs, then the least
    likely one, where a gap would show first; returns how bad it is and its index in [R], R > 0."""
    gap, different = np.abs(difference(trainer, rollout)), differs(trainer, rollout)
    gap, rare = (np.where(np.isnan(x), np.inf, x) for x in (gap, -rollout.astype(np.float64)))
    i = int(np.lexsort((rare, different, gap))[-1])
    return (float(gap[i]), bool(different[i]), float(rare[i])), i


@dataclass(frozen=True)
class Mismatch:
    """Names one token whose log-probability the trainer and the rollout do not agree on."""

    sample: int  # index in the batch
    position: int  # absolute, in the sequence: the prompt counts
    token: int  # id
    trainer_bits: int  # of the float32
    rollout_bits: int
    trainer: float  # nats
    rollout: float


def first_mismatch(
    trainer: NDArray[np.float32],
    rollout: NDArray[np.float32],
    sequence: NDArray[np.integer],
    positions: NDArray[np.integer],
    tokens: NDArray[np.integer],
) -> Mismatch | None:
    """Finds the token with different bits that is lowest in (sample, position), or None.

    First in the batch, not in memory: the same token is named however the batch was packed.
    """
    where = np.flatnonzero(differs(trainer, rollout))
    for name, array in (("sequence", sequence), ("positions", positions), ("tokens", tokens)):
        if array.shape != trainer.shape:
            raise ValueError(f"{name} {array.shape} must have one entry per token {trainer.shape}")
    if not where.size:
        return None
    i = where[np.lexsort((positions[where], sequence[where]))[0]]
    return Mismatch(
        sample=int(sequence[i]),
        position=int(positions[i]),
        token=int(tokens[i]),
        trainer_bits=int(bits(trainer)[i]),
        rollout_bits=int(bits(rollout)[i]),
        trainer=float(trainer[i]),
        rollout=float(rollout[i]),
    )
