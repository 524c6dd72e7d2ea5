"""Defines the losses of a batch's rows. Elementwise: the sum over rows is the gradient's tree, not a reduction here.

A new loss is a frozen dataclass (it travels to the trainer's ranks) whose call takes the trainer's log-probs and the `LossRows`
of a micro-batch of whole sequences, and returns (loss of each row float32 [R], clipped bool [R]). What combines the rows of a
sequence finds it in `LossRows.sequence`; its sums must have one order (`kernels`), or the cut into micro-batches would show.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from kernels.ops import exp, fold_rows, vocab_logprob, vocab_nodes


@dataclass(frozen=True)
class LossRows:
    """Holds what a loss sees of a micro-batch beside the trainer's log-probs. All [R], on the trainer's device."""

    logprobs: torch.Tensor  # float32, the sampler's
    advantages: torch.Tensor  # float32
    versions: torch.Tensor  # int64, of the weights that sampled each token
    sequence: torch.Tensor  # int64, the sequence of each row, counted from 0 in the micro-batch
    reference: torch.Tensor  # float32, the frozen model's log-probs, where there is one
    values: torch.Tensor  # float32, what the critic said when the batch was made, where there is one
    returns: torch.Tensor  # float32, what it should say


class Loss(Protocol):
    """Computes the loss of each row, before its weight."""

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class PolicyLoss:
    """Computes -min(ratio A, clip(ratio, 1 - low, 1 + high) A) with ratio = exp(logprobs - sampler's) (Schulman et al. 2017,
    equation 7; Yu et al. 2025, "DAPO", equation 10, for high > low).

    On the update that follows sampling the two log-probs are the same bits, so the ratio is exactly 1 and the gradient is
    -A, with no second forward pass for "old" log-probs.
    """

    low: float = 0.2
    high: float = 0.28

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        return self.of_ratio(exp(logprobs - rows.logprobs), rows)

    def of_ratio(self, ratio: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Clips `ratio` [R], to the side that the advantage pulls to."""
        up = rows.advantages >= 0
        clipped = torch.where(up, ratio > 1 + self.high, ratio < 1 - self.low)
        bound = torch.where(up, 1 + self.high, 1 - self.low)
        return -torch.where(clipped, bound, ratio) * rows.advantages, clipped


@dataclass(frozen=True)
class SequencePolicyLoss(PolicyLoss):
    """Computes `PolicyLoss` of the ratio of a row's whole sequence, s = exp(mean of its rows' logprobs - sampler's) (Zheng et
    al. 2025, "GSPO", equations 5 to 7).

    In the form of GSPO-token (equations 13 and 14): s is not differentiated but multiplied by exp(logprobs - the same), which
    is 1 and has the gradient. So the gradient of a row is -s A times its weight, where it is not clipped; with weights
    1 / (sequences x rows of its own) that is equation 10, and nothing is summed in the backward pass. The mean stands on the
    tree of the sequence's own rows, so that no cut into micro-batches shows. On the update that follows sampling s is 1.
    """

    low: float = 3e-4
    high: float = 4e-4

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        fixed = logprobs.detach()
        of_sequence = exp(sequence_means(fixed - rows.logprobs, rows.sequence))
        return self.of_ratio(of_sequence * exp(logprobs - fixed), rows)


def sequence_means(x: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """Returns for each row the mean of x over the rows of its sequence: their sum on the tree, every row a leaf, in order,
    divided by their number. x float32 [R]; `sequence` int64 [R], ascending -> float32 [R]."""
    if not len(x):
        return x
    sums, count = sequence_sums(x, sequence)
    return sums[sequence] / count[sequence].to(torch.float32)


def sequence_sums(x: torch.Tensor, sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (sum of x over the rows of each sequence, on the tree, every row a leaf, in order; their number). x float32 [R],
    R > 0; `sequence` int64 [R], ascending -> float32 [S], int64 [S], with S up to the last sequence that has rows."""
    first = torch.searchsorted(sequence, sequence)
    place = torch.arange(len(x), device=x.device) - first
    every = torch.arange(int(sequence[-1]) + 1, device=x.device)
    count = torch.searchsorted(sequence, every, right=True) - torch.searchsorted(sequence, every)
    # A column is a sequence. Rows that it lacks are +0, which changes no bit of a node: none is -0, as no leaf is
    table = x.new_zeros(int(count.max()), len(every))
    table[place, sequence] = x + 0.0
    return fold_rows(table), count


@dataclass(frozen=True)
class WeightedLikelihoodLoss:
    """Computes -clip(ratio, 1 - low, 1 + high) A logprobs with ratio = exp(logprobs - sampler's), which is not differentiated
    (MiniMax 2025, "MiniMax-M1": CISPO). `low` = 1: no lower bound.

    On the update that follows sampling the ratio is exactly 1 and the gradient that of `PolicyLoss`, bit for bit.
    """

    low: float = 1.0
    high: float = 4.0

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = exp(logprobs.detach() - rows.logprobs)
        clipped = (ratio > 1 + self.high) | (ratio < 1 - self.low)
        return -(ratio.clamp(1 - self.low, 1 + self.high) * rows.advantages) * logprobs, clipped


KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logprobs: torch.Tensor, reference: torch.Tensor, estimator: KlEstimator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates the KL divergence from the reference by each sampled token, with d = logprobs - reference (Schulman 2020,
    "Approximating KL Divergence"); returns it and its slope in `logprobs`. All float32 [R]:

        k1  d                1
        k2  d^2 / 2          d
        k3  e^-d - 1 + d     1 - e^-d      (Shao et al. 2024, equation 4)
    """
    d = logprobs - reference
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d * d * 0.5, d
    inverse = exp(-d)
    return (inverse - 1) + d, 1 - inverse


@dataclass(frozen=True)
class RegularisedLoss:
    """Computes `policy` + kl_coef times the KL estimate of each row against the reference (Shao et al. 2024, equation 3) -
    entropy_coef times its estimate of the entropy, -log p.

    The gradient of the entropy is estimated by the sampled token too: -log p grad log p, whose mean over what the policy draws
    is that of the whole vocabulary's entropy (Williams 1992: the mean of grad log p is 0). Both reach a row as one slope times
    its log-prob, so that its gradient is the sum of two numbers.
    """

    policy: Loss
    kl_coef: float = 0.0
    estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        losses, clipped = self.policy(logprobs, rows)
        fixed = logprobs.detach()
        value, slope = torch.zeros_like(fixed), torch.zeros_like(fixed)
        if self.kl_coef:
            value, slope = (self.kl_coef * x for x in kl_estimate(fixed, rows.reference, self.estimator))
        value, slope = (x + self.entropy_coef * fixed for x in (value, slope))
        return losses + (value + slope * (logprobs - fixed)), clipped


@dataclass(frozen=True)
class LikelihoodLoss:
    """Computes -log p of each token: the supervised warm start."""

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        return -logprobs, torch.zeros_like(logprobs, dtype=torch.bool)


@dataclass(frozen=True)
class ValueLoss:
    """Computes max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2 of a critic's values v, R the returns (Schulman et al.
    2016, "GAE", and the clip of their later code; Huang et al. 2022, "The 37 Implementation Details of PPO"). c = 0: no clip.

    A row whose clipped error is the larger one has no gradient.
    """

    clip: float

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        values = logprobs  # a critic says these in their place
        error = values - rows.returns
        plain = error * error * 0.5
        if not self.clip:
            return plain, torch.zeros_like(values, dtype=torch.bool)
        near = values.detach().clamp(rows.values - self.clip, rows.values + self.clip) - rows.returns
        bounded = near * near * 0.5
        clipped = bounded > plain.detach()
        return torch.where(clipped, bounded, plain), clipped


@dataclass(frozen=True)
class PreferenceLoss:
    """Computes -log sigmoid(h) of each pair of sequences, 2 i that was chosen and 2 i + 1 that was rejected, with h = beta
    (m(chosen) - m(rejected)) and m the sum over a sequence's rows of logprobs - reference (Rafailov et al. 2023, "DPO",
    equation 7). Both have rows, and lie in one micro-batch.

    The rows of a pair carry its loss in equal parts, and each the gradient of the whole: -beta sigmoid(-h) of the chosen one's,
    the same with another sign of the other's. m stands on the tree of the sequence's own rows.
    """

    beta: float

    def __call__(self, logprobs: torch.Tensor, rows: LossRows) -> tuple[torch.Tensor, torch.Tensor]:
        fixed, none = logprobs.detach(), torch.zeros_like(logprobs, dtype=torch.bool)
        if not len(fixed):
            return logprobs, none
        margins, count = sequence_sums(fixed - rows.reference, rows.sequence)
        h = self.beta * (margins[0::2] - margins[1::2])
        pull = self.beta / (1 + exp(h))
        slope = torch.stack([-pull, pull], 1).flatten()[rows.sequence]
        of_pair = -_log_sigmoid(h) / (count[0::2] + count[1::2]).to(torch.float32)
        return of_pair[rows.sequence // 2] + slope * (logprobs - fixed), none


def _log_sigmoid(h: torch.Tensor) -> torch.Tensor:
    """Returns log sigmoid(h) [R]: the log-prob of the first of two tokens whose logits are h and 0."""
    one = torch.ones_like(h)
    return vocab_logprob(vocab_nodes(torch.stack([h, torch.zeros_like(h)], 1), one, 1), h, one)[0]
