"""The proof of every step: the sampler's log-probabilities are the trainer's, byte for byte.

It costs no forward. The loss needs the trainer's log-probabilities anyway, and on the update that follows sampling they
must be the sampler's: the ratio is exactly 1, and "old" log-probabilities are not computed a second time. Only where sampling
is ahead of training (`lag.py`) is a further forward pass needed.
"""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rl.metrics import Mismatch, differs, first_mismatch
from trainer.batch import Batch

Policy = Literal["fail", "warn", "record"]


class AlignmentError(RuntimeError):
    """Says that sampler and trainer disagree; the message says where, `mismatch` holds it."""

    def __init__(self, line: str, mismatch: Mismatch) -> None:
        super().__init__(line)
        self.mismatch = mismatch

    def __reduce__(self) -> tuple[type["AlignmentError"], tuple[str, Mismatch]]:
        return type(self), (str(self), self.mismatch)  # so that it survives the way back from a Ray actor


def check(
    trainer: NDArray[np.float32],
    rollout: NDArray[np.float32],
    sequence: NDArray[np.integer],
    positions: NDArray[np.integer],
    tokens: NDArray[np.integer],
    policy: Policy,
    step: int,
    by: Mapping[int, str] = MappingProxyType({}),
) -> Mismatch | None:
    """Returns None if all log-probabilities [R] have the same bits, else the first mismatch: raised (fail), printed (warn) or
    just returned (record: a run with numerics=fast, which is expected to differ).

    `sequence`, `positions`, `tokens` [R]: the sample, the absolute position and the id of each response token. `by`: the
    trainer's rank that computed a sample.
    """
    if policy not in get_args(Policy):
        raise ValueError(f"align.policy={policy}: must be fail or warn (or record, of a contrast run)")
    mismatch = first_mismatch(trainer, rollout, sequence, positions, tokens)
    if mismatch is None:
        return None
    line = describe(mismatch, step, int(np.count_nonzero(differs(trainer, rollout))), trainer.size)
    if mismatch.sample in by:
        line += f"; the trainer's is of {by[mismatch.sample]}"
    if policy == "fail":
        raise AlignmentError(line, mismatch)
    if policy == "warn":
        print(line, file=sys.stderr, flush=True)
    return mismatch


def describe(mismatch: Mismatch, step: int, differing: int, compared: int) -> str:
    """Describes a mismatch in one line: the place, both values (shortest decimals that name the float32), both bit patterns,
    and how many."""
    m = mismatch
    return (
        f"step {step}: sample {m.sample}, position {m.position}, token {m.token}: "
        f"log-prob of the trainer {np.float32(m.trainer)!s} (0x{m.trainer_bits:08x}) "
        f"and of the rollout {np.float32(m.rollout)!s} (0x{m.rollout_bits:08x}) differ; "
        f"{differing} of {compared} response tokens differ"
    )


def check_batch(
    batch: Batch,
    logprobs: NDArray[np.float32],
    policy: Policy,
    step: int,
    by: Mapping[int, str] = MappingProxyType({}),
) -> Mismatch | None:
    """Does `check` for a whole batch. `logprobs` [R]: the trainer's, of its loss rows; `by` as of `check`."""
    where = batch.sequence, batch.positions, batch.token_ids[batch.rows]
    return check(logprobs, batch.logprobs, *where, policy, step, by)
