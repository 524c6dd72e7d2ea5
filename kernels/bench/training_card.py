"""`python -m trainer.bench --device cuda`: the trainer at Qwen3-8B's or Qwen3-30B-A3B's widths beside `transformers`
with SDPA and, of experts, grouped matmuls, on one GPU.

Ours is the trainer as it trains: one FSDP2 rank over float32 masters, rounded as they are gathered; gradients in float32;
sequences packed, up to four of them a leaf of the gradient, as in the recipe; the log-prob fused with the LM head. Theirs has
bfloat16 weights and gradients, and a float32 cross entropy. Operations are those that
`kernels.model.costs.training_flops` counts.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import register_fsdp_forward_method

from kernels.bench.table import Cell, console, show
from kernels.bench.timer import samples, versions
from kernels.gpu.card import choose_family, chosen_family
from kernels.host.command import write_json
from kernels.model import Layout, ModelConfig, Parameter, costs, known, trained
from kernels.model.operations import Numerics
from rl.replay.sides import one_rank
from trainer.batch import Batch
from trainer.loss import LikelihoodLoss
from trainer.model import TrainerModel
from trainer.parallelize import fill, parallelize
from trainer.trainer import Trainer, TrainerConfig

LAYERS = {"qwen3_8b": 6, "qwen3_30b_a3b": 4}
"""Of each model, unless asked otherwise."""
SHAPES = ("1x8192", "4x2048", "8x1024")
BODY, HEAD, STEP = "body", "with head and log-prob", "with head, log-prob and optimizer"


@dataclass
class Row:
    """Holds forward and backward of one batch: milliseconds, and the most memory that was allocated meanwhile, by whose
    it is."""

    shape: str
    part: str
    work: float  # operations
    milliseconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def tflops(self, whose: str) -> float:
        """Returns a side's 10^12 operations a second."""
        return self.work / self.milliseconds[whose] / 1e9

    def ratio(self, of: str, to: str) -> float | None:
        """Divides one time by another; None where they were not both measured."""
        have = {of, to} <= self.milliseconds.keys()
        return self.milliseconds[of] / self.milliseconds[to] if have else None

    def as_json(self) -> dict[str, Any]:
        """Returns the row with its speeds and ratios."""
        ratios = {f"{of} / {to}": r for of, to in RATIOS if (r := self.ratio(of, to))}
        return {**asdict(self), "TFLOP/s": {w: self.tflops(w) for w in self.milliseconds}, "ratio": ratios}


def table_rows(config: ModelConfig, shapes: list[str]) -> list[Row]:
    """Returns the rows of each shape, with their operations."""
    out = []
    for shape in shapes:
        sequences, length = sizes(shape)
        work = {head: costs.training_flops(config, [length] * sequences, head) for head in (False, True)}
        out += [Row(shape, part, work[part != BODY]) for part in (BODY, HEAD, STEP)]
    return out


def sizes(shape: str) -> tuple[int, int]:
    """Splits "4x2048" into sequences and tokens of each."""
    sequences, length = map(int, shape.split("x"))
    return sequences, length


def leaf(sequences: int) -> int:
    """Returns the sequences of one leaf of the gradient's tree: 4, as in the recipe of Qwen3-8B, where so many divide
    the batch."""
    return math.gcd(4, sequences)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Returns the median by the device's clock, after one run that is not counted."""
    return statistics.median(samples(work, repeats, on_gpu=True)) * 1e3


def measure(row: Row, whose: str, work: Callable[[], object], repeats: int) -> None:
    """Times one side of a row."""
    torch.cuda.reset_peak_memory_stats()
    row.milliseconds[whose] = milliseconds(work, repeats)
    row.peak_bytes[whose] = torch.cuda.max_memory_allocated()


def random_weights(config: ModelConfig) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Draws master weights on the card."""
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in trained(config):
        whole = torch.ones(parameter.shape, device="cuda")
        if parameter.columns:
            whole.normal_(std=config.init_std, generator=generator)
        yield parameter, whole


def time_ours(config: ModelConfig, numerics: Numerics, rows: list[Row], repeats: int) -> None:
    """Times ours, into the column `numerics`."""
    config, mesh = replace(config, numerics=numerics), init_device_mesh("cuda", (1,))
    _time_backward(config, mesh, [row for row in rows if row.part != STEP], repeats)
    _free()
    _time_steps(config, mesh, [row for row in rows if row.part == STEP], repeats)
    _free()


def _time_backward(config: ModelConfig, mesh: DeviceMesh, rows: list[Row], repeats: int) -> None:
    """Times without the optimizer, whose moments are not allocated, as theirs are not."""
    with torch.device("meta"):
        model = TrainerModel(config, torch.bfloat16)
    parallelize(model, mesh)
    register_fsdp_forward_method(model, "hidden")
    with torch.no_grad():
        named = dict(model.named_parameters())
        for parameter, whole in random_weights(config):
            fill(named[parameter.name], whole)
    for row in rows:
        measure(row, config.numerics, _backward(model, row), repeats)


def _time_steps(config: ModelConfig, mesh: DeviceMesh, rows: list[Row], repeats: int) -> None:
    most = max((math.prod(sizes(row.shape)) for row in rows), default=1)
    how = TrainerConfig(leaf_sequences=1, micro_leaves=1, micro_tokens=most, dtype=torch.bfloat16)
    trainer = Trainer(config, how, mesh, random_weights(config))
    for row in rows:
        batch, (sequences, _) = _batch(config, row), sizes(row.shape)
        trainer.config = replace(how, leaf_sequences=leaf(sequences))
        measure(row, config.numerics, partial(trainer.step, batch, LikelihoodLoss(), 1e-6), repeats)


def _free() -> None:
    gc.collect()  # modules of FSDP2 are cycles
    torch.cuda.empty_cache()


def _batch(config: ModelConfig, row: Row) -> Batch:
    """Builds a batch: every token but the first of a sequence is a loss row."""
    sequences, length = sizes(row.shape)
    tokens = np.arange(sequences * length)
    rows = tokens[tokens % length > 0]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, len(tokens))
    weights = np.full(len(rows), 1 / len(rows), np.float32)
    return Batch.of(ids, np.full(sequences, length), rows, weights=weights)


def _backward(model: TrainerModel, row: Row) -> Callable[[], object]:
    (sequences, length), batch = sizes(row.shape), _batch(model.config, row)
    ids, targets, temperatures = (torch.from_numpy(t).cuda() for t in (batch.token_ids, batch.rows, batch.temperatures))
    group = leaf(sequences)
    layout = Layout.packed([length] * sequences, [group] * (sequences // group), "cuda")
    groups = torch.arange(sequences // group + 1, device="cuda") * (group * (length - 1))

    def body() -> None:
        model.hidden(ids, layout).float().mean().backward()
        model.zero_grad()

    def head() -> None:
        model(ids, layout, targets, groups, temperatures).mean().backward()
        model.zero_grad()

    return body if row.part == BODY else head


def time_theirs(config: ModelConfig, rows: list[Row], repeats: int, compiled: bool) -> None:
    """Times theirs, into the columns `transformers` and, where `compiled`, `compiled` (the body alone, by torch.compile)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    how = {"attn_implementation": "sdpa"} | ({"experts_implementation": "grouped_mm"} if config.experts else {})
    theirs = AutoConfig.for_model(**config.to_hf("bfloat16"))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(theirs, **how).train()
    torch.set_default_dtype(torch.float32)
    bodies: dict[str, Any] = {"transformers": model.model}
    if compiled:
        bodies["compiled"] = torch.compile(model.model)

    def backward(body: Any, ids: torch.Tensor) -> None:
        body(ids, use_cache=False).last_hidden_state.float().mean().backward()
        model.zero_grad()

    def whole(ids: torch.Tensor) -> None:
        logits = model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        model.zero_grad()

    for row in rows:
        ids = torch.randint(config.vocab_size, sizes(row.shape), device="cuda")
        if row.part == HEAD:
            measure(row, "transformers", partial(whole, ids), repeats)
        elif row.part == BODY:
            for whose, body in bodies.items():
                measure(row, whose, partial(backward, body, ids), repeats)


def matmul_tflops(repeats: int) -> float:
    """Measures the vendor's speed on an 8192^3 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192.0**3 / milliseconds(lambda: a @ b, 4 * repeats) / 1e9


def _compile(config: ModelConfig, shape: str, part: str) -> None:
    """Leaves the kernels of one row on disk, in a process of the pool, by a model of one layer and a small vocabulary."""
    vocabulary = 336 * config.leaves  # a leaf ends inside a tile, as in the whole one
    config, (sequences, _) = replace(config, layers=1, vocab_size=vocabulary), sizes(shape)
    with one_rank():
        time_ours(config, "exact", [Row(f"{sequences}x{1024 // sequences}", part, 0.0)], 1)


def prepare(config: ModelConfig, rows: list[Row]) -> None:
    """Compiles side by side what would otherwise be compiled one after the other, while it is timed."""
    jobs = [(config, row.shape, row.part) for row in rows if row.part != HEAD]
    processes, told = min(len(jobs), 8), (chosen_family(),)
    with ProcessPoolExecutor(processes, get_context("spawn"), choose_family, told) as pool:
        for job in [pool.submit(_compile, *job) for job in jobs]:
            job.result()


RATIOS = (("transformers", "exact"), ("compiled", "exact"), ("exact", "fast"))
"""Ratios of times: above 1 we are faster than theirs; above 1 exactness costs time."""


def print_table(rows: list[Row], peak: float, out: Console) -> None:
    """Prints the speed of each side with the most memory it took, and ratios; `peak`: the vendor's TFLOP/s on a product."""
    whose = [w for w in ("exact", "fast", "transformers", "compiled") if any(w in row.milliseconds for row in rows)]
    ratios = [pair for pair in RATIOS if set(pair) <= set(whose)]
    lines: list[tuple[Cell, ...]] = []
    for row in rows:
        sides = [(f"{row.tflops(w):.0f}" if w in row.milliseconds else "", _gib(row.peak_bytes.get(w))) for w in whose]
        times = ["" if (r := row.ratio(*pair)) is None else f"{r:.3f}" for pair in ratios]
        lines.append((row.shape, row.part, *sides, *times))
    title = f"forward + backward, TFLOP/s and memory at most (torch.mm of 8192^3: {peak:.0f} TFLOP/s)"
    show(out, ("tokens", "part"), (*whose, *(f"{of} / {to}" for of, to in ratios)), lines, title)


def _gib(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.1f} GiB"


def run(
    model: str, shapes: list[str], layers: int | None, repeats: int, fast: bool, compiled: bool, path: Path | None
) -> None:
    """Times every shape and prints the table; `fast`, `compiled`: those sides too."""
    layers = layers or LAYERS[model]
    config, out = replace(known.ON_CARDS[model], layers=layers), console()
    rows = table_rows(config, shapes)
    kinds: list[Numerics] = ["exact", "fast"] if fast else ["exact"]
    where: dict[str, Any] = versions()
    begin = time.perf_counter()

    def done(what: str) -> None:
        """Writes what was measured so far."""
        out.print(f"[dim]{time.perf_counter() - begin:5.0f} s[/] {what}")
        write_json(path, {**where, "model": model, "layers": layers, "rows": [row.as_json() for row in rows]})

    prepare(config, rows)
    done("compiled")
    where["matmul TFLOP/s"] = peak = matmul_tflops(repeats)
    time_theirs(config, rows, repeats, compiled)
    done("timed transformers")
    _free()
    with one_rank():
        for kind in kinds:
            time_ours(config, kind, rows, repeats)
            done(f"timed ours, {kind}")
    print_table(rows, peak, out)
    out.print(", ".join(f"{k} {v}" for k, v in versions().items()))
