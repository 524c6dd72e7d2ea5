"""What a train step eats, and what it reports."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kernels.ops import Truncation


class BatchError(ValueError):
    """Batch sizes that do not fit together; one line with the formula and the numbers."""


@dataclass(frozen=True)
class Batch:
    """S whole sequences, side by side: T tokens of which R are response tokens (each sequence's last `response` tokens).

    Sequences stand in leaf order: consecutive `leaf_sequences` of them are one leaf of the gradient's tree.
    """

    token_ids: np.ndarray  # int64 [T]
    lengths: np.ndarray  # int64 [S], tokens of each sequence
    responses: np.ndarray  # int64 [S], response tokens of each sequence
    logprobs: np.ndarray  # float32 [R], the sampler's (zeros for the likelihood objective, which does not read them)
    advantages: np.ndarray  # float32 [R]
    weights: np.ndarray  # float32 [R], of each token in the loss: 1 / (an exact count)
    temperatures: np.ndarray  # float32 [R]
    truncation: Truncation = field(default_factory=Truncation.none)  # of some of the R, what they were drawn from

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    def take(self, start: int, stop: int) -> "Batch":
        """Sequences start .. stop."""
        tokens = np.concatenate([[0], np.cumsum(self.lengths)])
        rows = np.concatenate([[0], np.cumsum(self.responses)])
        t, r = slice(tokens[start], tokens[stop]), slice(rows[start], rows[stop])
        return Batch(
            self.token_ids[t],
            self.lengths[start:stop],
            self.responses[start:stop],
            self.logprobs[r],
            self.advantages[r],
            self.weights[r],
            self.temperatures[r],
            self.truncation.take(r.start, r.stop),
        )

    def response_rows(self) -> np.ndarray:
        """int64 [R]: the token index of each response token; the row before it is the one that predicts it."""
        ends = np.cumsum(self.lengths)
        return np.concatenate([np.arange(e - n, e) for e, n in zip(ends, self.responses, strict=True)])


def check_batch_arithmetic(sequences: int, leaf_sequences: int, micro_leaves: int, world_size: int) -> int:
    """Micro-batches of each rank in one step, or BatchError. The one formula for batch sizes:

        sequences = leaf_sequences * micro_leaves * world_size * (micro-batches of each rank)

    with micro_leaves and world_size powers of two, so that every rank's part is a whole subtree.
    """
    for name, value in (("trainer.micro_leaves", micro_leaves), ("trainer.world_size", world_size)):
        if value < 1 or value & (value - 1):
            raise BatchError(f"{name}={value} must be a power of two")
    unit = leaf_sequences * micro_leaves * world_size
    if sequences < 1 or sequences % unit:
        raise BatchError(
            f"{sequences} sequences a step are no multiple of trainer.leaf_sequences={leaf_sequences} * "
            f"trainer.micro_leaves={micro_leaves} * trainer.world_size={world_size} = {unit}"
        )
    return sequences // unit


@dataclass(frozen=True)
class MicroBatch:
    """An aligned subtree of the global batch: `leaves` consecutive leaves on each rank, beginning at leaf `first`."""

    first: int
    leaves: int  # of each rank, a power of two

    def sequences(self, rank: int, leaf_sequences: int) -> tuple[int, int]:
        """Those that `rank` computes."""
        start = (self.first + rank * self.leaves) * leaf_sequences
        return start, start + self.leaves * leaf_sequences

    def level(self, world_size: int) -> int:
        """Of the node that all ranks' leaves make, in the tree over leaves."""
        return (self.leaves * world_size).bit_length() - 1


def cut(lengths: np.ndarray, leaf_sequences: int, world_size: int, micro_leaves: int) -> list[MicroBatch]:
    """The global batch as micro-batches of `micro_leaves` leaves a rank, in leaf order."""
    count = check_batch_arithmetic(len(lengths), leaf_sequences, micro_leaves, world_size)
    return [MicroBatch(i * micro_leaves * world_size, micro_leaves) for i in range(count)]


def cut_by_tokens(lengths: np.ndarray, leaf_sequences: int, world_size: int, micro_tokens: int) -> list[MicroBatch]:
    """The global batch as the largest aligned subtrees of which no rank's part has more than `micro_tokens` tokens, in leaf
    order; sizes may differ from one to the next.

    Every rank cuts alike, by the rank with the most tokens, since all of them take part in the reduction of each micro-batch.
    BatchError where one leaf alone has more. `lengths`: tokens of each sequence.
    """
    check_batch_arithmetic(len(lengths), leaf_sequences, 1, world_size)
    leaves = lengths.reshape(-1, leaf_sequences).sum(1)
    if (longest := int(leaves.argmax())) >= 0 and leaves[longest] > micro_tokens:
        raise BatchError(
            f"leaf {longest} has {leaves[longest]} tokens ({leaf_sequences} sequences) and trainer.micro_tokens is "
            f"{micro_tokens}: raise it to at least {leaves[longest]}"
        )
    out, first = [], 0
    while first < len(leaves):
        size = 1
        while _fits(leaves, first, 2 * size, world_size, micro_tokens):
            size *= 2
        out.append(MicroBatch(first, size))
        first += size * world_size
    return out


def _fits(leaves: np.ndarray, first: int, size: int, world_size: int, micro_tokens: int) -> bool:
    """Whether `size` leaves a rank, from `first` on, are an aligned subtree within the budget."""
    stop = first + size * world_size
    if first % (size * world_size) or stop > len(leaves):
        return False
    return int(leaves[first:stop].reshape(world_size, size).sum(1).max()) <= micro_tokens


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as one rank saw it or as all did (`merge`)."""

    logprobs: np.ndarray  # float32 [R], the trainer's, for the sequences below
    sequences: np.ndarray  # int64 [S], positions in the batch of the sequences this rank computed
    responses: np.ndarray  # int64 [S]
    loss: float  # sum over tokens of weight * loss, float64
    clip_fraction: float  # of this rank's tokens
    grad_norm: float  # before clipping
    step: int
    peak_bytes: int  # most memory of the device in this step; on a CPU: of the process since it began
    host_peak_bytes: int  # most memory of the process since it began

    @staticmethod
    def merge(parts: Sequence["StepReport"]) -> "StepReport":
        """All ranks' reports as one, in batch order."""
        sequences = np.concatenate([p.sequences for p in parts])
        responses = np.concatenate([p.responses for p in parts])
        pieces = [piece for p in parts for piece in np.split(p.logprobs, np.cumsum(p.responses)[:-1])]
        order = np.argsort(sequences)
        tokens = [len(p.logprobs) for p in parts]
        return StepReport(
            logprobs=np.concatenate([pieces[i] for i in order]),
            sequences=sequences[order],
            responses=responses[order],
            loss=sum(p.loss for p in parts),
            clip_fraction=float(np.average([p.clip_fraction for p in parts], weights=tokens)),
            grad_norm=parts[0].grad_norm,
            step=parts[0].step,
            peak_bytes=max(p.peak_bytes for p in parts),
            host_peak_bytes=max(p.host_peak_bytes for p in parts),
        )
