"""Computes the tokens of a batch as the trainer does, and as the sampler does, and records what each op returns.

The trainer: packed sequences, with gradients, leaf by leaf, on one rank. The sampler: keys in pages, given tokens in
one chunk and sampled ones a step each, several sequences at once, on one rank. In an exact run neither layout decides a bit, so
that these are the bits of any other; log-probs are over the whole vocabulary here, without top-k, top-p and min-p.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kernels.collectives import TreeGroup
from kernels.model import Layout, ModelConfig, Parameter
from rl.replay.recording import LOGPROB, Recording, Stage, watched
from rollout.runner import Runner
from rollout.sampling import Request, SamplingParams
from rollout.sequence import Sequence, Span
from trainer.batch import Batch
from trainer.model import batch_logprobs
from trainer.trainer import Trainer, TrainerConfig

OpenWeights = Callable[[], Iterable[tuple[Parameter, torch.Tensor]]]
"""Yields whole parameters, one at a time, from the first on."""
_PAGE = 16


@dataclass(frozen=True)
class Model:
    """Says what is computed, in which arithmetic and where."""

    config: ModelConfig
    dtype: torch.dtype
    device: str = "cpu"


def trainer_side(
    model: Model, weights: OpenWeights, batch: Batch, leaf: int = 8, watch: tuple[Stage, int] | None = None
) -> Recording:
    """Records the trainer's forward over `batch`, `leaf` sequences at a time. `watch`: a stage and a token, whose row is
    kept."""
    recording, ends = Recording(len(batch.token_ids), watch), np.cumsum(batch.lengths)
    plain = _unfiltered(batch)
    with one_rank():
        config = watched(model.config, recording)
        how = TrainerConfig(leaf, 1, dtype=model.dtype)
        trainer = Trainer(config, how, init_device_mesh(model.device, (1,)), weights())
        for start in range(0, batch.sequences, leaf):
            stop = min(start + leaf, batch.sequences)
            first = int(ends[start] - batch.lengths[start])
            recording.at(np.arange(first, int(ends[stop - 1])))
            part = plain.take(start, stop)
            logprobs = batch_logprobs(trainer.model, part, part.sequences, model.device)
            recording.put((model.config.layers, LOGPROB), part.rows + first, logprobs)
    return recording


def sampler_side(
    model: Model, weights: OpenWeights, batch: Batch, together: int = 32, watch: tuple[Stage, int] | None = None
) -> Recording:
    """Records the sampler's forward over `batch`, `together` sequences at a time; the last token of each is not computed, as it
    is not while sampling. `watch` as of `trainer_side`."""
    recording = Recording(len(batch.token_ids), watch)
    starts = np.cumsum(batch.lengths) - batch.lengths
    groups = [range(i, min(i + together, batch.sequences)) for i in range(0, batch.sequences, together)]
    most = max(sum(-(-int(batch.lengths[i]) // _PAGE) for i in group) for group in groups)
    config = watched(model.config, recording)
    runner = Runner(config, TreeGroup(), most, _PAGE, model.dtype, model.device)
    for parameter, whole in weights():
        runner.load(parameter, whole)
    for group in groups:
        for spans in _steps(batch, group):
            places = [starts[s.sequence.request.id] + p for s in spans for p in range(s.start, s.stop)]
            recording.at(np.array(places))
            given = runner.launch(spans).results()[1]
            scoring = [s for s in spans if s.scored]
            targets = [starts[s.sequence.request.id] + p for s in scoring for p in s.scored]
            values = torch.tensor([value for scores in given for value, _ in scores], dtype=torch.float32)
            if targets:
                recording.put((model.config.layers, LOGPROB), targets, values)
    return recording


def _steps(batch: Batch, group: range) -> Iterator[list[Span]]:
    """Yields the spans of one step after another: those of a kind side by side, as the runner has them."""
    pages, waiting = 0, []
    starts = np.cumsum(batch.lengths) - batch.lengths
    for i in group:
        length, start = int(batch.lengths[i]), int(starts[i])
        tokens = tuple(batch.token_ids[start : start + length].tolist())
        rows = {int(r) - start: k for k, r in enumerate(batch.rows) if start <= r < start + length}
        sequence = Sequence(Request(i, tokens, SamplingParams(0)), list(tokens))
        held = -(-length // _PAGE)
        sequence.pages, pages = list(range(pages, pages + held)), pages + held
        waiting.append(_spans(sequence, rows, batch.temperatures))
    while waiting:
        step, going = [], []
        for spans in waiting:
            if span := next(spans, None):
                step.append(span)
                going.append(spans)
        waiting = going
        if step:
            yield sorted(step, key=lambda s: Layout.kind((s.start, s.stop)))


def _spans(sequence: Sequence, rows: dict[int, int], temperatures: np.ndarray) -> Iterator[Span]:
    """Cuts a sequence as it was sampled: given tokens in one piece, sampled ones a step each. `rows`: the loss row of each
    position that has one."""
    start, length = 0, len(sequence.tokens)
    while start < length - 1:
        stop = start + 1
        while stop < length - 1 and stop not in rows and start not in rows:
            stop += 1
        scored = range(0)
        if stop in rows:
            scored, scale = range(stop, stop + 1), float(temperatures[rows[stop]])
            sampling = SamplingParams(0, scale)
            sequence.request = replace(sequence.request, sampling=sampling)
        yield Span(sequence, start, stop, False, False, scored)
        start = stop


def _unfiltered(batch: Batch) -> Batch:
    """The batch, whose log-probs are over the whole vocabulary."""
    rows = len(batch.rows)
    return replace(
        batch,
        top_k=np.zeros(rows, np.int64),
        top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
    )


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Opens a process group of this process alone, unless there is one already."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
