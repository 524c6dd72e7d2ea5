"""Makes the trainer's batch of sampled or demonstrated sequences."""

from collections.abc import Sequence

import numpy as np

from rl.data import Problem
from rl.samples import Transcript, completions
from rollout.sampling import Completion
from trainer.batch import COLUMNS, Batch


def pack(
    transcripts: Sequence[Transcript],
    advantages: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    reference: np.ndarray | None = None,
) -> Batch:
    """Makes one batch of all sequences, in order. Every sampled token is a loss row, and what it was sampled with comes from
    its completion: requests of any temperatures and filters may stand side by side. The other columns are
    float32 [R], and where they are not known as `trainer.batch.COLUMNS` has them."""
    ids: list[int] = []
    rows: list[int] = []
    ends: list[int] = []
    for transcript in transcripts:
        for piece in transcript:
            tokens = piece.token_ids if isinstance(piece, Completion) else piece
            if isinstance(piece, Completion):
                rows += range(len(ids), len(ids) + len(tokens))
            ids += tokens
        ends.append(len(ids))
    done = [c for t in transcripts for c in completions(t)]
    lengths = np.diff(np.array(ends, dtype=np.int64), prepend=0)
    given = {"advantages": advantages, "weights": weights, "reference": reference}
    columns = _as_sampled(done) | {name: column for name, column in given.items() if column is not None}
    return Batch.of(np.array(ids, dtype=np.int64), lengths, np.array(rows, dtype=np.int64), **columns)


def _as_sampled(done: Sequence[Completion]) -> dict[str, np.ndarray]:
    """Returns the columns that the sampler knows."""
    counts = [len(c.token_ids) for c in done]
    of_completions = {
        "temperatures": [c.sampling.scale for c in done],
        "top_k": [c.sampling.filters[0] for c in done],
        "top_p": [c.sampling.filters[1] for c in done],
        "min_p": [c.sampling.filters[2] for c in done],
    }
    of_tokens = {
        "logprobs": [x for c in done for x in c.logprobs],
        "versions": [v for c in done for v in c.token_versions],
    }
    columns = {name: np.array(values, dtype=COLUMNS[name][0]) for name, values in (of_completions | of_tokens).items()}
    return columns | {name: np.repeat(columns[name], counts) for name in of_completions}


def pack_supervised(solutions: Sequence[tuple[Problem, tuple[int, ...]]]) -> Batch:
    """Makes a batch of (problem, solution tokens) pairs, each token weighted 1 / (all solution tokens of the batch)."""
    counts = np.array([len(s) for _, s in solutions], dtype=np.int64)
    lengths = np.array([len(p.prompt_ids) for p, _ in solutions], dtype=np.int64) + counts
    total = int(counts.sum())
    return Batch.of(
        np.concatenate([np.array(p.prompt_ids + s, dtype=np.int64) for p, s in solutions]),
        lengths,
        np.concatenate([np.arange(end - n, end) for end, n in zip(np.cumsum(lengths), counts, strict=True)]),
        weights=np.full(total, 1.0 / total, dtype=np.float32),
    )
