"""From groups, or supervised examples, to the trainer's batch."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from kernels.ops import Truncation
from rl.data import Problem
from rl.score import Group
from rollout.sampling import SamplingParams
from trainer.batch import Batch


def pack(
    groups: Sequence[Group], sampling: SamplingParams, mean: Literal["token", "sequence", "constant"], limit: int
) -> Batch:
    """One batch of all samples, in order, drawn as `sampling` says. Every token's weight in the loss is 1 over an exact count:

    token     all response tokens of the batch          (token-mean; Yu et al. 2025, equation 8)
    sequence  sequences x tokens of its own sequence     (Shao et al. 2024, equation 3)
    constant  sequences x `limit` (max_new_tokens)       (Liu et al. 2025, section 3)
    """
    samples = [(g.problem, s.completion, a) for g in groups for s, a in zip(g.samples, g.advantages, strict=True)]
    responses = np.array([len(c.token_ids) for _, c, _ in samples], dtype=np.int64)
    total, sequences = int(responses.sum()), len(samples)
    counts = {
        "token": np.full(sequences, total),
        "sequence": sequences * responses,
        "constant": np.full(sequences, sequences * limit),
    }[mean]
    return Batch(
        token_ids=np.concatenate([np.array(p.prompt_ids + c.token_ids, dtype=np.int64) for p, c, _ in samples]),
        lengths=np.array([len(p.prompt_ids) + len(c.token_ids) for p, c, _ in samples], dtype=np.int64),
        responses=responses,
        logprobs=np.concatenate([np.array(c.logprobs, dtype=np.float32) for _, c, _ in samples]),
        advantages=np.repeat(np.array([a for *_, a in samples], dtype=np.float32), responses),
        weights=np.repeat((1.0 / counts).astype(np.float32), responses),
        temperatures=np.full(total, sampling.scale, dtype=np.float32),
        truncation=_truncation(total if sampling.truncated else 0, sampling),
    )


def _truncation(rows: int, sampling: SamplingParams) -> Truncation:
    """The filters of the first `rows` response tokens."""
    return Truncation(
        torch.arange(rows),
        torch.full((rows,), sampling.top_k),
        torch.full((rows,), sampling.top_p, dtype=torch.float32),
        torch.full((rows,), sampling.min_p, dtype=torch.float32),
    )


def pack_supervised(solutions: Sequence[tuple[Problem, tuple[int, ...]]]) -> Batch:
    """(problem, solution tokens) pairs, each token weighted 1 / (all solution tokens of the batch)."""
    responses = np.array([len(s) for _, s in solutions], dtype=np.int64)
    total = int(responses.sum())
    return Batch(
        token_ids=np.concatenate([np.array(p.prompt_ids + s, dtype=np.int64) for p, s in solutions]),
        lengths=np.array([len(p.prompt_ids) for p, _ in solutions], dtype=np.int64) + responses,
        responses=responses,
        logprobs=np.zeros(total, dtype=np.float32),
        advantages=np.ones(total, dtype=np.float32),
        weights=np.full(total, 1.0 / total, dtype=np.float32),
        temperatures=np.ones(total, dtype=np.float32),
    )
