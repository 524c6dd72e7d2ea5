"""How far the trainer's and the sampler's log-probabilities of the same response tokens are apart.

In samebit they are the same bytes, so every metric below sits on its ideal value at every step. "Differs" is decided on
the bit patterns alone, with no tolerance: -0.0 and 0.0 differ, two NaNs with the same bits are equal.

All arrays are [R], one entry per response token of the batch; log-probabilities are float32, in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

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
        "divergence/ratio_min": ("min e^d", 1.0),
        "divergence/ratio_mean": ("mean e^d", 1.0),
        "divergence/ratio_max": ("max e^d", 1.0),
        "divergence/pearson": ("correlation of e^t and e^r; 1 if all bits are equal", 1.0),
        "divergence/ess": ("(Σ w)² / (R · Σ w²), w = e^d", 1.0),
    }
)
"""Metric name -> (formula, ideal value); d = trainer minus rollout log-probability, over response tokens."""


def bits(logprobs: NDArray[np.float32]) -> NDArray[np.uint32]:
    """The bit patterns [R] of float32 values [R]. Another dtype is an error: a cast would hide a difference."""
    if logprobs.dtype != np.float32:
        raise TypeError(f"log-probabilities must be float32, got {logprobs.dtype}")
    return np.ascontiguousarray(logprobs).view(np.uint32)


def differs(trainer: NDArray[np.float32], rollout: NDArray[np.float32]) -> NDArray[np.bool_]:
    """True [R] where the two bit patterns are not the same."""
    if trainer.ndim != 1 or trainer.shape != rollout.shape:
        raise ValueError(f"trainer {trainer.shape} and rollout {rollout.shape} log-probabilities must both be [R]")
    return bits(trainer) != bits(rollout)


def divergence(
    trainer: NDArray[np.float32], rollout: NDArray[np.float32], sequence: NDArray[np.integer]
) -> dict[str, float]:
    """The metrics of `FORMULAS`, plus `divergence/tokens_compared` = R; `sequence` is the sample of each token.

    Computed in float64. Equal bits are d = 0, so -inf on both sides is no gap. With R = 0 every metric is ideal: nothing
    differs, and tokens_compared says that nothing was compared. A gap of ±inf or a NaN is passed on, not hidden.
    """
    different = differs(trainer, rollout)
    if sequence.shape != trainer.shape:
        raise ValueError(f"sequence {sequence.shape} must be one sample index per token {trainer.shape}")
    tokens = trainer.size
    if not different.any():
        return {"divergence/tokens_compared": float(tokens)} | {name: ideal for name, (_, ideal) in FORMULAS.items()}

    with np.errstate(all="ignore"):
        t, r = trainer.astype(np.float64), rollout.astype(np.float64)
        d = np.where(different, t - r, 0.0)
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
            "divergence/ratio_min": ratio.min(),
            "divergence/ratio_mean": ratio.mean(),
            "divergence/ratio_max": ratio.max(),
            "divergence/pearson": _pearson(np.exp(t), np.exp(r)),
            "divergence/ess": weight.sum() ** 2 / (tokens * np.square(weight).sum()),
        }
    return {name: float(value) for name, value in metrics.items()}


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Correlation of x and y [R]; NaN where one of them is constant, since it is not defined there."""
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt(np.square(x).sum() * np.square(y).sum()))


@dataclass(frozen=True)
class Mismatch:
    """One token whose log-probability the trainer and the rollout do not agree on."""

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
    """The token with different bits that is lowest in (sample, position), or None.

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
