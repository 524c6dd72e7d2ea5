"""The updates on one batch: the first is on-policy, unless sampling was ahead (`lag.py`), and is compared to the last bit;
those after it are not.

Mini-batches are consecutive groups, in the same order in every epoch (verl and TRL shuffle).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl.metrics import divergence
from trainer.batch import Batch, StepReport


@dataclass(frozen=True)
class Update:
    """Holds what one update was given and what it reported."""

    batch: Batch
    report: StepReport
    critic: StepReport | None = None


def parts(batch: Batch, mini_batches: int, epochs: int) -> Iterator[Batch]:
    """Yields what each update trains on: `mini_batches` equal parts of the batch, `epochs` times."""
    size = batch.sequences // mini_batches
    for _ in range(epochs):
        for start in range(0, batch.sequences, size):
            yield batch if mini_batches == 1 else batch.take(start, start + size)


def measure(updates: Sequence[Update], on_policy: int = 1) -> dict[str, Any]:
    """Counts the updates of a step, and says of those after the first `on_policy` how far the weights had moved from the
    sampler's, over their tokens (formulas as of `rl.metrics`)."""
    later = updates[on_policy:]
    counts = {"policy/updates": len(updates), "policy/updates_on_policy": on_policy}
    if not later:
        return counts
    trainer, rollout = (
        np.concatenate(x) for x in zip(*((u.report.logprobs, u.batch.logprobs) for u in later), strict=True)
    )
    found = divergence(trainer, rollout, np.zeros(len(trainer), dtype=np.int64))
    names = ("ratio_min", "ratio_mean", "ratio_max", "kl_k1", "kl_k3", "ess")
    return {
        **counts,
        **{f"off_policy/{name}": found[f"divergence/{name}"] for name in names},
        "off_policy/clip_fraction": sum(u.report.clipped for u in later) / max(1, len(trainer)),
        "off_policy/grad_norm_max": max(u.report.grad_norm for u in later),
    }


def from_reference(batch: Batch) -> dict[str, float]:
    """Measures how far the policy that sampled is from the frozen model, over the sampled tokens, with d = log-prob of the
    policy - the frozen model's: policy/kl_ref is the mean of e^-d - 1 + d, policy/kl_ref_k1 that of d."""
    d = batch.logprobs.astype(np.float64) - batch.reference.astype(np.float64)
    with np.errstate(all="ignore"):
        return {"policy/kl_ref": float((np.expm1(-d) + d).mean()), "policy/kl_ref_k1": float(d.mean())}


def from_critic(batch: Batch, updates: Sequence[Update]) -> dict[str, float]:
    """Measures the critic of a step: its loss in the mean of the updates, its largest gradient norm, and, by what it said
    before them, 1 - Var(return - value) / Var(return) over the sampled tokens (NaN where all returns are equal)."""
    reports = [u.critic for u in updates if u.critic]
    returns = batch.returns.astype(np.float64)
    error, spread = returns - batch.values.astype(np.float64), returns.var()
    return {
        "critic/loss": math.fsum(r.loss for r in reports) / len(reports),
        "critic/grad_norm_max": max(r.grad_norm for r in reports),
        "critic/clip_fraction": sum(r.clipped for r in reports) / max(1, sum(len(r.logprobs) for r in reports)),
        "critic/explained_variance": float(1 - error.var() / spread) if spread else math.nan,
    }
