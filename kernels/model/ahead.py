"""Compiles the GPU kernels of a model before the processes that serve or train it start, side by side, and says so.

What a run launches follows from the model, the tensor-parallel size and the kinds of batch. `launches` goes through them with
uninitialised tensors of the real widths and few layers; a kernel that it misses is compiled when it is first launched.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import kernels
from kernels.collectives import TreeGroup
from kernels.gpu.card import Card, card_of
from kernels.model.blocks import Delta, Weight
from kernels.model.config import ModelConfig
from kernels.model.decoder import decoder_layer, forward, head_logits
from kernels.model.formats import PLAIN, Format
from kernels.model.layout import Layout, PagedCache
from kernels.model.parameter import Parameter
from kernels.model.parameters import layer_weights, outer_weights, served, trained
from kernels.ops import (
    Mixture,
    Quantized,
    adamw,
    gumbel_argmax,
    linear_logprob,
    square_rows,
    sum_rows,
    vocab_logprob,
    vocab_nodes,
)
from kernels.ops.quantize import FP8
from kernels.tree import KEY_SPLIT, Shard

BATCHES = (1, 2, 8, 16, 24, 32, 64, 128, 256)
"""Sequences of decode steps: each falls under another plan, or is another multiple of 16, than the one before."""

MOST_WORKERS = 16


@dataclass(frozen=True)
class Serving:
    """Says what an engine will be asked for; None where a process only trains."""

    tp: int
    page_size: int
    most_running: int
    most_tokens: int  # of one sequence


def prepare(
    config: ModelConfig,
    dtype: torch.dtype,
    serving: Serving | None,
    training: bool,
    say: Callable[[str], None],
    family: str = "auto",
) -> None:
    """Compiles for the first visible card what the cache on disk lacks. Nothing where an earlier call left it all there.
    `family`: of the kernels, as `kernels.gpu.card.choose_family` takes it."""
    from triton import knobs

    from kernels.gpu.ahead import Compiled, Source, compile_ahead

    card = card_of(torch.device("cuda", torch.cuda.current_device()))
    arguments = {
        "hf": config.to_hf(),
        "leaves": config.leaves,
        "format": config.format,
        "dtype": str(dtype).removeprefix("torch."),
        "serving": serving and vars(serving),
        "training": training,
    }
    done = Path(knobs.cache.dir) / f"samebit-{_key(arguments, card, family)}"
    if done.exists():
        return
    workers = max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0))))
    say(f"compiling GPU kernels for {card.name}, {workers} at a time; they are kept in {knobs.cache.dir}")
    shown = 0

    def report(row: Compiled, known: int) -> None:
        nonlocal shown
        shown += 1
        if shown % 20 == 0:
            say(f"compiled {shown} kernels of the {known} found so far")

    rows = compile_ahead(Source("kernels.model.ahead:launches", arguments), card, workers, report, family=family)
    say(f"compiled {len(rows)} kernels")
    if not any(row.error for row in rows):  # else the launch itself will say what is wrong
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()


def _key(arguments: dict[str, Any], card: Card, family: str) -> str:
    """Names everything that the compiled kernels depend on: these sources, the versions, the card and the shapes."""
    import triton

    digest = hashlib.sha256(
        json.dumps([arguments, asdict(card), family, triton.__version__, torch.__version__]).encode()
    )
    root = Path(kernels.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


class _OneOf:
    """Stands for the transport of the first of some ranks that are not there: as many values as from all of them."""

    capturable = True

    def __init__(self, size: int) -> None:
        self.shard = Shard(0, size)

    def all_reduce(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return partial if partial.dtype == dtype else torch.empty(partial.shape, dtype=dtype)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.empty(self.shard.size, *x.shape, dtype=x.dtype)

    def reduce_scatter(self, output: torch.Tensor, input: torch.Tensor) -> None:
        """Leaves in `output` what it holds."""


def launches(
    hf: dict[str, Any],
    leaves: int,
    dtype: str,
    serving: dict[str, int] | None,
    training: bool,
    format: Format = PLAIN,
) -> None:
    """Launches what serving and training the model would. Its tensors hold anything: nothing of them may be read."""
    config = ModelConfig.from_hf(hf, leaves, format=format)
    config = replace(config, layers=min(2, config.layers))  # the last one reads other rows
    if training:  # first, as its kernels take longest
        _train(config, getattr(torch, dtype))
    if serving:
        with torch.no_grad():
            _serve(config, getattr(torch, dtype), Serving(**serving))


def _serve(config: ModelConfig, dtype: torch.dtype, serving: Serving) -> None:
    group, page = TreeGroup(transport=_OneOf(serving.tp)), serving.page_size
    weights = {p.name: _weight(config, p.part(group.shard), dtype) for p in served(config)}
    most = min(serving.most_tokens, config.max_positions)
    pages = -(-most // page)
    shape = (config.layers, (pages + 1) * page, config.kv_heads // serving.tp, config.head_dim)
    cache = PagedCache(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))
    table = _rope_rows(config)

    def step(spans: Sequence[tuple[int, int]], wanted: bool) -> None:
        held = -(-max(stop for _, stop in spans) // page)
        layout = Layout.paged(spans, [list(range(held))] * len(spans), page)
        ends = torch.tensor([stop - start for start, stop in spans]).cumsum(0) - 1
        layout = replace(layout, wanted=ends) if wanted else layout

        def run_layer(i: int, x: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
            weight = layer_weights(weights, i)
            return decoder_layer(config, group, weight, i, x, delta, layout, cache, table)

        ids = torch.zeros(int(ends[-1]) + 1, dtype=torch.int64)
        hidden = forward(config, group, outer_weights(weights), run_layer, ids, layout, dtype)
        rows = len(spans)
        logits = head_logits(config, outer_weights(weights), hidden[:rows])
        temperature, seeds = torch.ones(rows), torch.zeros(rows, dtype=torch.int64)
        gumbel_argmax(logits, temperature, seeds, seeds, torch.zeros(rows, dtype=torch.uint8), 0)
        vocab_nodes(logits, temperature, config.leaves // serving.tp)
        vocab_logprob(torch.empty(rows, config.leaves, 2), torch.empty(rows), temperature)

    for batch in sorted({min(batch, serving.most_running) for batch in BATCHES}):
        for reach in (min(most, KEY_SPLIT // 2), most):
            step([(reach - 1, reach)] * batch, False)
    if most > 1:
        step([(0, min(most, 512))], True)
        step([(0, most // 2 + 1)] * 3, True)
    if most > 2 * page + 1:
        step([(page, 2 * page)] * 2, True)
        step([(page, min(most, page + 520))], True)


def _weight(config: ModelConfig, part: Parameter, dtype: torch.dtype) -> Weight:
    if config.quantizes(part):
        return Quantized(torch.empty(part.shape, dtype=FP8), torch.empty(part.scales.shape))
    return torch.empty(part.shape, dtype=dtype)


def _train(config: ModelConfig, dtype: torch.dtype) -> None:
    weights = {p.name: torch.empty(p.shape, dtype=dtype) for p in trained(config)}
    for weight in weights.values():
        weight.requires_grad_()
        weight.grad_dtype = torch.float32
    table = _rope_rows(config)
    for lengths in ([min(config.max_positions, 512)] * 4, [min(config.max_positions, 301)] * 2):
        layout = Layout.packed(lengths, [len(lengths)])

        def run_layer(
            i: int, x: torch.Tensor, delta: Delta, layout: Layout = layout
        ) -> tuple[torch.Tensor, torch.Tensor | Mixture]:
            return decoder_layer(config, TreeGroup(), layer_weights(weights, i), i, x, delta, layout, None, table)

        ids = torch.zeros(sum(lengths), dtype=torch.int64)
        outer = outer_weights(weights)
        hidden = forward(config, TreeGroup(), outer, run_layer, ids, layout, dtype)
        rows = sum(lengths) // 2
        groups = torch.tensor([0, rows])
        linear_logprob(
            hidden[:rows], outer.head, ids[:rows], torch.ones(rows), config.leaves, groups, None
        ).sum().backward()
    with torch.no_grad():
        for name in ("embed", "norm"):
            shape = weights[name].shape
            tensors = [torch.empty(shape) for _ in range(4)]
            adamw(*tensors, step=1, lr=1e-6, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, grad_scale=1.0)
            squares = square_rows(tensors[0].reshape(shape[0], -1))
            sum_rows(squares[:, None], torch.tensor([0, shape[0]]))


def _rope_rows(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (config.max_positions, config.head_dim // 2)
    return torch.empty(shape), torch.empty(shape)
