"""Packs a step's samples into a batch: which of them count, and the share of each of their tokens in the mean of the loss."""

from collections.abc import Sequence

import numpy as np

from rl.algorithms.advantages import judged
from rl.algorithms.algorithm import AlgorithmSection, LossMean
from rl.algorithms.overlong import cut_off
from rl.pack import pack
from rl.samples import Group, sampled_counts
from trainer.batch import Batch


def weighed(
    groups: Sequence[Group],
    worth: np.ndarray,
    section: AlgorithmSection,
    limit: int,
    least: int = 2,
    reference: np.ndarray | None = None,
) -> Batch:
    """Makes the batch of all samples, in order. Every sampled token has its advantage, `worth` float64 [R], and its share of
    the mean of its mini-batch; where a sample does not count both are 0. `limit`: rollout.max_new_tokens; `least`: as of
    `counted`; `reference`: as of `Algorithm.batch`."""
    transcripts = [sample.transcript for group in groups for sample in group.samples]
    counts = sampled_counts(transcripts)
    counts_in = np.array(counted(groups, least, section.mask_overlong), dtype=bool)
    part = len(groups) // section.mini_batches
    ends = np.cumsum([len(group.samples) for group in groups])[part - 1 :: part]
    pieces = zip(np.split(counts, ends[:-1]), np.split(counts_in, ends[:-1]), strict=True)
    divisors = np.concatenate([loss_counts(*piece, section.loss_mean, limit) for piece in pieces])
    shares = np.where(counts_in, 1.0 / divisors, 0.0)
    advantages = np.where(np.repeat(counts_in, counts), worth, 0.0).astype(np.float32)
    return pack(transcripts, advantages, np.repeat(shares.astype(np.float32), counts), reference)


def of_tokens(worth: Sequence[float], groups: Sequence[Group]) -> np.ndarray:
    """Gives each sampled token what its sample is worth: float64 [R]."""
    counts = sampled_counts([sample.transcript for group in groups for sample in group.samples])
    return np.repeat(np.array(worth, dtype=np.float64), counts)


def counted(groups: Sequence[Group], least: int, mask_overlong: bool) -> list[bool]:
    """Says of each sample whether it is trained on: it has a reward, as have at least `least` of its group (0: rewards are not
    asked for), and was not cut off where that is asked for."""
    out = []
    for group in groups:
        enough = len(judged(group.rewards)) >= least
        has_say = [enough and (s.reward is not None or not least) for s in group.samples]
        out += [says and not (mask_overlong and cut_off(s)) for says, s in zip(has_say, group.samples, strict=True)]
    return out


def loss_counts(counts: np.ndarray, counted: np.ndarray, mean: LossMean, limit: int) -> np.ndarray:
    """Returns the exact count that each sequence's tokens are divided by, int64 [S], at least 1, from its sampled tokens,
    `counts` int64 [S]. Only the sequences that are `counted`, bool [S], are in the mean:

    token     all their sampled tokens                   (token-mean; Yu et al. 2025, equation 8)
    sequence  sequences x sampled tokens of its own      (Shao et al. 2024, equation 3)
    constant  sequences x `limit` (max_new_tokens)       (Liu et al. 2025, section 3)
    """
    sequences = np.count_nonzero(counted)
    of_mean = {
        "token": np.full(len(counts), counts[counted].sum()),
        "sequence": sequences * counts,
        "constant": np.full(len(counts), sequences * limit),
    }
    return np.maximum(of_mean[mean], 1)
