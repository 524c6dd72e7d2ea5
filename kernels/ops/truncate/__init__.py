"""Which tokens a sampler may draw: those of the vocabulary that top-k, top-p and min-p keep."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.device import UnsupportedError, same_device

ROWS = 128
"""Rows of a whole vocabulary that are filtered at once: they take some 20 bytes a token on a GPU."""


@dataclass(frozen=True)
class Truncation:
    """Holds the rows of a batch that draw from a part of the vocabulary, and their filters; see `kept_tokens`."""

    rows: torch.Tensor  # int64 [F], ascending
    top_k: torch.Tensor  # int64 [F], 0: no limit
    top_p: torch.Tensor  # float32 [F], 1: no limit
    min_p: torch.Tensor  # float32 [F], 0: no limit

    @classmethod
    def none(cls) -> "Truncation":
        """Returns the rows of a batch of which each draws from the whole vocabulary."""
        return cls(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), *torch.empty(2, 0))

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device | str) -> "Truncation":
        """Copies every column to `device`."""
        return Truncation(*(t.to(device) for t in vars(self).values()))

    def take(self, start: int, stop: int) -> "Truncation":
        """Takes rows start .. stop, counted from there."""
        inside = (self.rows >= start) & (self.rows < stop)
        return Truncation(self.rows[inside] - start, self.top_k[inside], self.top_p[inside], self.min_p[inside])

    def parts(self) -> Iterator["Truncation"]:
        """Yields parts of at most `ROWS` rows each."""
        for start in range(0, len(self), ROWS):
            yield Truncation(*(t[start : start + ROWS] for t in vars(self).values()))

    def kept(self, logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """Returns uint8 [F, V] for the logits float32 [F, V] of these rows alone, and the temperatures of all rows."""
        return kept_tokens(logits.detach(), temperature[self.rows], self.top_k, self.top_p, self.min_p)


def kept_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Returns uint8 [R, V]: 1 where a token passes three filters, one after another, over p = softmax(logits /
    temperature), tokens ordered by falling logit and, among equals, by rising id:

        top_k   it is among the first k                                               (0: no limit)
        top_p   the tokens before it have less than top_p of what the first k have    (1: no limit)
        min_p   p >= min_p max p                                                      (0: no limit)

    The first token always passes. logits float32 [R, V], the whole vocabulary; temperature, top_p, min_p float32 [R]; top_k
    int64 [R]. Probabilities are compared as integers, floor(2^40 e^(z - max z)), so that their sums have no order.

    Invariant to batch and position. Nucleus sampling: Holtzman et al. 2019, section 3.1; min-p: Nguyen et al. 2024, section 3.
    """
    if logits.dtype != torch.float32 or logits.dim() != 2:
        raise UnsupportedError(f"truncate: logits {tuple(logits.shape)} {logits.dtype} must be float32 [R, V]")
    return same_device("truncate", logits, temperature).kept(logits, temperature, top_k, top_p, min_p)


def truncate(logits: torch.Tensor, temperature: torch.Tensor, truncation: Truncation) -> None:
    """Writes -inf in place for every token of float32 logits [R, V] that `truncation` does not keep."""
    for part in truncation.parts():
        some = logits[part.rows]
        logits[part.rows] = some.masked_fill(part.kept(some, temperature) == 0, -torch.inf)


def exclude_padding(logits: torch.Tensor, vocabulary: int, first_id: int = 0) -> None:
    """Writes -inf in place for the ids from `vocabulary` on of logits [R, V], the ids first_id .. first_id + V. What is
    not a token is then never drawn and adds +0 to every sum of exponentials, wherever shards and leaves end."""
    if first_id + logits.shape[1] > vocabulary:
        logits[:, max(vocabulary - first_id, 0) :] = -torch.inf
