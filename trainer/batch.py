"""Defines what a train step is given, what it reports, and how it is cut into micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trainer.routing import RoutingReport


class BatchError(ValueError):
    """Says that batch sizes do not fit together; one line with the formula and the numbers."""


COLUMNS: dict[str, tuple[type[np.generic], float]] = {
    "logprobs": (np.float32, 0.0),
    "advantages": (np.float32, 1.0),
    "weights": (np.float32, 1.0),
    "temperatures": (np.float32, 1.0),
    "top_k": (np.int64, 0),
    "top_p": (np.float32, 1.0),
    "min_p": (np.float32, 0.0),
    "versions": (np.int64, -1),
    "reference": (np.float32, 0.0),
    "values": (np.float32, 0.0),
    "returns": (np.float32, 0.0),
}
"""The columns of a batch's rows: the dtype of each, and what a row has that nobody sampled or weighed."""


@dataclass(frozen=True)
class Batch:
    """Holds S whole sequences, side by side: T tokens, of which R are trained on, the loss rows. They may be any tokens but
    the first of a sequence (nothing precedes it): one stretch at its end, the turns of a conversation, or none.

    Sequences stand in leaf order: consecutive `leaf_sequences` of them are one leaf of the gradient's tree. BatchError where
    the arrays do not fit together.
    """

    token_ids: np.ndarray  # int64 [T]
    lengths: np.ndarray  # int64 [S], tokens of each sequence
    rows: np.ndarray  # int64 [R], ascending: the token index of each loss row; the token before it predicts it
    logprobs: np.ndarray  # float32 [R], the sampler's
    advantages: np.ndarray  # float32 [R]
    weights: np.ndarray  # float32 [R], of each row in the loss: 1 / (an exact count)
    temperatures: np.ndarray  # float32 [R], that the logits were divided by; the filters below are as of `kernels.ops`
    top_k: np.ndarray  # int64 [R], 0: no limit
    top_p: np.ndarray  # float32 [R], 1: no limit
    min_p: np.ndarray  # float32 [R], 0: no limit
    versions: np.ndarray  # int64 [R], of the weights that sampled each token; -1: none did
    reference: np.ndarray  # float32 [R], log-probs of the frozen model (`trainer.frozen`), where there is one
    values: np.ndarray  # float32 [R], what the critic said before each token, where there is one
    returns: np.ndarray  # float32 [R], what it should say

    def __post_init__(self) -> None:
        if int(self.lengths.sum()) != len(self.token_ids):
            raise BatchError(f"lengths of {self.lengths.sum()} tokens in all for {len(self.token_ids)} token ids")
        wrong = {name: len(c) for name in COLUMNS if len(c := getattr(self, name)) != len(self.rows)}
        if wrong:
            raise BatchError(f"{len(self.rows)} loss rows and {wrong}: every column must have one entry a row")
        steps = np.diff(self.rows, prepend=-1, append=len(self.token_ids))
        if (steps <= 0).any():
            raise BatchError(f"loss rows must ascend within 0 .. {len(self.token_ids) - 1}: {self.rows}")
        if len(first := np.intersect1d(self.rows, self._starts())):
            raise BatchError(
                f"token {first[0]} is the first of its sequence: nothing predicts it, so it is no loss row"
            )

    @classmethod
    def of(cls, token_ids: np.ndarray, lengths: np.ndarray, rows: np.ndarray, **columns: np.ndarray) -> "Batch":
        """Makes a batch whose other columns are as `COLUMNS` has them."""
        neutral = {name: np.full(len(rows), value, dtype) for name, (dtype, value) in COLUMNS.items()}
        return cls(token_ids, lengths, rows, **(neutral | columns))

    @property
    def sequences(self) -> int:
        """Counts the sequences."""
        return len(self.lengths)

    @property
    def sequence(self) -> np.ndarray:
        """Returns int64 [R]: the sequence of each row."""
        return np.searchsorted(np.cumsum(self.lengths), self.rows, side="right")

    @property
    def counts(self) -> np.ndarray:
        """Returns int64 [S]: loss rows of each sequence."""
        return np.bincount(self.sequence, minlength=self.sequences)

    @property
    def positions(self) -> np.ndarray:
        """Returns int64 [R]: the place of each row in its sequence."""
        return self.rows - self._starts()[self.sequence]

    def _starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def take(self, start: int, stop: int) -> "Batch":
        """Returns the batch of sequences start .. stop."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        first, last = ends[start], ends[stop]
        some = slice(*np.searchsorted(self.rows, [first, last]))
        columns = {name: getattr(self, name)[some] for name in COLUMNS}
        return Batch(self.token_ids[first:last], self.lengths[start:stop], self.rows[some] - first, **columns)


def check_batch_arithmetic(sequences: int, leaf_sequences: int, micro_leaves: int, world_size: int) -> int:
    """Returns the micro-batches of each rank in one step, or raises BatchError. The one formula for batch sizes:

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
    """Holds an aligned subtree of the global batch: `leaves` consecutive leaves on each rank, beginning at leaf `first`."""

    first: int
    leaves: int  # of each rank, a power of two

    def sequences(self, rank: int, leaf_sequences: int) -> tuple[int, int]:
        """Returns (first, last + 1) of those that `rank` computes."""
        start = (self.first + rank * self.leaves) * leaf_sequences
        return start, start + self.leaves * leaf_sequences

    def level(self, world_size: int) -> int:
        """Returns the level, in the tree over leaves, of the node that all ranks' leaves make."""
        return (self.leaves * world_size).bit_length() - 1


def cut(lengths: np.ndarray, leaf_sequences: int, world_size: int, micro_leaves: int) -> list[MicroBatch]:
    """Cuts the global batch into micro-batches of `micro_leaves` leaves a rank, in leaf order."""
    count = check_batch_arithmetic(len(lengths), leaf_sequences, micro_leaves, world_size)
    return [MicroBatch(i * micro_leaves * world_size, micro_leaves) for i in range(count)]


def cut_by_tokens(lengths: np.ndarray, leaf_sequences: int, world_size: int, micro_tokens: int) -> list[MicroBatch]:
    """Cuts the global batch into the largest aligned subtrees of which no rank's part has more than `micro_tokens` tokens, in
    leaf order; sizes may differ from one to the next.

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
    """Tells whether `size` leaves a rank, from `first` on, are an aligned subtree within the budget."""
    stop = first + size * world_size
    if first % (size * world_size) or stop > len(leaves):
        return False
    return int(leaves[first:stop].reshape(world_size, size).sum(1).max()) <= micro_tokens


@dataclass(frozen=True)
class Rows:
    """Holds a value for each loss row of some sequences of a batch: those that one rank computed, or all (`merge`)."""

    values: np.ndarray  # [R]
    sequences: np.ndarray  # int64 [S], positions in the batch
    counts: np.ndarray  # int64 [S], loss rows of each

    @staticmethod
    def merge(parts: Sequence["Rows"]) -> "Rows":
        """Joins the parts, in batch order."""
        sequences = np.concatenate([p.sequences for p in parts])
        counts = np.concatenate([p.counts for p in parts])
        pieces = [piece for p in parts for piece in np.split(p.values, np.cumsum(p.counts)[:-1])]
        order = np.argsort(sequences)
        return Rows(np.concatenate([pieces[i] for i in order]), sequences[order], counts[order])


@dataclass(frozen=True)
class StepReport:
    """Reports one optimizer step, as one rank saw it or as all did (`merge`)."""

    logprobs: np.ndarray  # float32 [R], the trainer's, of the loss rows of the sequences below
    sequences: np.ndarray  # int64 [S], positions in the batch of the sequences this rank computed
    counts: np.ndarray  # int64 [S], loss rows of each
    loss: float  # sum over rows of weight * loss, float64
    clipped: int  # rows whose ratio was clipped
    grad_norm: float  # before clipping
    step: int
    peak_bytes: int  # most memory of the device in this step; on a CPU: of the process since it began
    host_peak_bytes: int  # most memory of the process since it began
    routing: RoutingReport | None = None  # of a mixture of experts
    by: Mapping[int, str] = field(default_factory=dict)
    """The rank that computed a sequence, by its position in the batch, where that is known."""

    @property
    def clip_fraction(self) -> float:
        """Divides the tokens whose ratio was clipped by all of them."""
        return self.clipped / max(1, len(self.logprobs))

    @staticmethod
    def merge(parts: Sequence["StepReport"], names: Sequence[str] = ()) -> "StepReport":
        """Joins all ranks' reports, in batch order. `names` of the ranks."""
        rows = Rows.merge([Rows(p.logprobs, p.sequences, p.counts) for p in parts])
        return StepReport(
            logprobs=rows.values,
            sequences=rows.sequences,
            counts=rows.counts,
            loss=sum(p.loss for p in parts),
            clipped=sum(p.clipped for p in parts),
            grad_norm=parts[0].grad_norm,
            step=parts[0].step,
            peak_bytes=max(p.peak_bytes for p in parts),
            host_peak_bytes=max(p.host_peak_bytes for p in parts),
            routing=RoutingReport.merge([p.routing for p in parts]),
            by={int(s): name for name, p in zip(names, parts, strict=False) for s in p.sequences},
        )
