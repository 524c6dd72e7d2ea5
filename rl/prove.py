"""`python -m rl.prove`: whole runs in many layouts, and the table of their hashes.

Each row is a run as `rl.train` makes it (warm start, sampling, scoring, training, publishing) on a small model. What a layout
changes (FSDP world size, micro-batch, activation checkpointing, offload, tensor-parallel size, engines, placement, a SIGKILL
and a resume) must change no bit, so all rows of a dtype show one SHA-256; exit code 1 where they do not. By default a few
layouts that cover the values; --sample N: N drawn from the product; --all: the product.
"""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from kernels.host.command import Parser, count, fail, interruptible, output
from kernels.scratch import scratch
from rl.align import AlignmentError
from rl.cluster import left_at_once, session
from rl.compose import ROOT, check
from rl.config import RunConfig
from rl.data import open_source
from rl.errors import BAD_INPUT, RunError, UserError
from rl.hosted.asked import elsewhere
from rl.identity import family_of_run
from rl.run.files import write_atomic
from rl.run.screen import Bar, Screen

SMALL = (
    "steps=3",
    "warmup.steps=2",
    "warmup.sequences=64",
    "algorithm.prompts_per_step=8",
    "trainer.leaf_sequences=4",
    "eval.problems=16",
    "data.problems=500",
    "model.hf.hidden_size=64",
    "model.hf.intermediate_size=128",
    "model.hf.num_hidden_layers=2",
    "rollout.pages=256",
    "checkpoint.every=1",
    "logger=none",
)
BY_TOKENS = "tokens"
AXES: dict[str, tuple[Any, ...]] = {  # field of Layout: its values
    "dtype": ("float32", "bfloat16"),
    "world_size": (1, 2, 4),
    "micro": (1, 2, 4, BY_TOKENS),
    "checkpointing": ("none", "selective", "layer"),
    "offload": ("none", "optimizer", "all"),
    "tp": (1, 2, 4),
    "replicas": (1, 2),
    "placement": ("colocated", "split"),
    "killed": (False, True),
}
KEYS = {  # the config keys of those, which no override may set
    "dtype": "model.dtype",
    "world_size": "trainer.world_size",
    "checkpointing": "trainer.checkpointing",
    "offload": "trainer.offload",
    "tp": "rollout.tp",
    "replicas": "rollout.replicas",
    "placement": "cluster.placement",
}
CHOSEN = (*KEYS.values(), "trainer.micro_leaves", "trainer.micro_tokens", "out_dir")


@dataclass(frozen=True)
class Layout:
    """Names one way to lay a run out, in which no value may change a bit."""

    dtype: str
    world_size: int  # FSDP ranks
    micro: int | str  # leaves of the gradient's tree in one micro-batch, or BY_TOKENS: as many as a budget allows
    checkpointing: str
    offload: str
    tp: int
    replicas: int
    placement: str  # of rollout and trainer: they share the cards, and hand memory over, or have a card for each rank
    killed: bool  # with SIGKILL, in another layout, and resumed in this one

    def overrides(self, out_dir: Path, budget: int) -> list[str]:
        """Returns the overrides of the small run. `budget`: tokens of a micro-batch where they cut it."""
        values = [f"{key}={getattr(self, name)}" for name, key in KEYS.items()]
        leaves, tokens = (1, budget) if self.micro == BY_TOKENS else (self.micro, "null")
        return [*values, f"trainer.micro_leaves={leaves}", f"trainer.micro_tokens={tokens}", f"out_dir={out_dir}"]

    def other(self) -> "Layout":
        """Returns the layout that a killed run began in."""
        other = replace(self, world_size=3 - self.world_size if self.world_size < 3 else 2, micro=2, replicas=1)
        offload = "optimizer" if self.offload == "none" else "none"
        return replace(other, checkpointing="none", offload=offload, placement="colocated")


@dataclass(frozen=True)
class Row:
    """Holds how the run of one layout ended."""

    layout: Layout
    device: str
    sha256: str  # of the trained weights; empty where the run failed
    compared: int  # log-probs, sampler against trainer
    differing: int
    seconds: float
    error: str
    family: str  # of the GPU kernels; empty on a CPU


def product(device: str) -> list[Layout]:
    """Lists all layouts there are on this machine, in each dtype that the device computes in."""
    others = [values for name, values in AXES.items() if name != "dtype"]
    return [x for values in itertools.product(_dtypes(device), *others) if _fits(x := Layout(*values), device)]


def few(device: str) -> list[Layout]:
    """Chooses some in which every value occurs, in each of these dtypes."""
    chosen: list[tuple[Any, ...]] = [
        (1, 1, "none", "none", 1, 1, "colocated", False),
        (1, 2, "layer", "all", 2, 2, "colocated", False),
        (2, 4, "selective", "optimizer", 1, 1, "colocated", True),
        (4, BY_TOKENS, "none", "none", 4, 1, "colocated", False),
        (1, 4, "none", "none", 1, 1, "split", False),
    ]
    return [x for dtype in _dtypes(device) for values in chosen if _fits(x := Layout(dtype, *values), device)]


def _fits(layout: Layout, device: str) -> bool:
    """A split needs a card for every rank; otherwise ranks share what there is."""
    ranks = layout.world_size + layout.tp * layout.replicas
    return device == "cpu" or layout.placement == "colocated" or ranks <= torch.cuda.device_count()


def _dtypes(device: str) -> tuple[str, ...]:
    return AXES["dtype"] if device == "cpu" else ("bfloat16",)


def _shape(layout: Layout) -> Layout:
    """With what cannot make a layout impossible as it is in the first of all: fewer to check before the runs."""
    return replace(layout, dtype="bfloat16", checkpointing="none", offload="none", killed=False)


def budget_of(config: RunConfig) -> int:
    """Counts the tokens of two leaves of the longest sequences there can be: in most leaves they are fewer, and more leaves
    fit."""
    source = open_source(config)
    prompt = max(len(p.prompt_ids) for p in (*source.train, *source.held_out))
    return 2 * config.trainer.leaf_sequences * (prompt + config.rollout.max_new_tokens)


def prove(chosen: Sequence[Layout], overrides: Sequence[str], folder: Path, budget: int) -> Iterator[Row]:
    """Does one run after the other, under one Ray."""
    first = check([*SMALL, *overrides])[0]
    with session(first.cluster, 4, folder / "train.log"):
        for i, layout in enumerate(chosen):
            yield _row(layout, first.device, overrides, folder / str(i), budget)


def _row(layout: Layout, device: str, overrides: Sequence[str], out_dir: Path, budget: int) -> Row:
    from rl.train import train

    start, error = time.perf_counter(), ""
    config = check([*SMALL, *overrides, *layout.overrides(out_dir, budget)])[0]
    summary: dict[str, Any] = {"weights_sha256": "", "tokens_compared": 0, "tokens_nonzero": 0}
    try:
        if layout.killed:
            _killed([*SMALL, *overrides, *layout.other().overrides(out_dir, budget)], out_dir)
        summary = train(config, Screen(quiet=True))
    except (RunError, AlignmentError) as stopped:
        error = str(stopped)
    seconds = round(time.perf_counter() - start, 1)
    numbers = summary["tokens_compared"], summary["tokens_nonzero"], seconds
    family = family_of_run(config) if device == "cuda" else ""
    return Row(layout, device, summary["weights_sha256"], *numbers, error, family)


def _killed(overrides: Sequence[str], out_dir: Path) -> None:
    """A run of its own process, killed once GRPO has begun and a checkpoint is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rl.train", *overrides],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    log = out_dir / "metrics.jsonl"
    try:
        while process.poll() is None:
            if log.exists() and b'"grpo/step"' in log.read_bytes():
                return
            time.sleep(0.01)
        assert process.stderr is not None
        raise RunError(f"the run that was to be killed ended by itself: {process.stderr.read().decode().strip()[:300]}")
    finally:
        process.kill()
        process.wait()


def table(rows: Sequence[Row]) -> Table:
    """Makes a table of the rows: layout, differing log-probs, seconds, hash."""
    out = Table(title="One run in many layouts: SHA-256 of the trained weights", title_justify="left")
    titles = ("dtype", "FSDP", "micro", "checkpointing", "offload", "TP", "engines", "placement", "killed")
    for name in (*titles, "log-probs ≠", "s", "weights"):
        right = name in ("FSDP", "TP", "engines", "log-probs ≠", "s")
        out.add_column(name, justify="right" if right else "left", overflow="fold")  # never cut, however narrow
    for row in rows:
        *cells, killed = asdict(row.layout).values()
        cells.append("yes" if killed else "")
        weights = row.sha256[:12] or f"failed: {row.error}"
        out.add_row(*map(str, cells), f"{row.differing}/{row.compared}", f"{row.seconds:.0f}", weights)
    return out


def against(rows: Sequence[Row]) -> str:
    """Says what speaks against the proof; "" where no run failed, no log-prob differed, and every dtype has one hash."""
    hashes = {(row.layout.dtype, row.sha256) for row in rows if row.sha256}
    if len(hashes) > len({dtype for dtype, _ in hashes}):
        return "the hashes differ: the layout changed the run"
    if differing := sum(row.differing for row in rows):
        return f"{differing} log-probs of the sampler are not the trainer's"
    if failed := [row.error for row in rows if not row.sha256]:
        return f"{len(failed)} of {len(rows)} runs did not reach their end, and show nothing: {failed[0]}"
    return ""


def main(arguments: Sequence[str]) -> None:
    """Runs the chosen layouts and prints their table; exits with 1 where a hash or a log-prob differs, with 2 for bad input."""
    parser = Parser(prog="rl.prove", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("overrides", nargs="*", help="of the small run: device=cuda steps=5 seed=1 ...")
    parser.add_argument("--all", action="store_true", help="every layout of the product, which takes hours")
    parser.add_argument("--sample", type=int, metavar="N", help="N layouts of the product, drawn anew each time")
    parser.add_argument("--first", type=count, metavar="N", help="the first N of the few that are chosen by default")
    parser.add_argument("--json", type=output, help="write the rows to this file")
    args = parser.parse_args(arguments)
    console = Screen(width=None if sys.stdout.isatty() else 140)  # in a file no column is cut
    rows: list[Row] = []
    try:
        for override in args.overrides:
            if override.lstrip("+").partition("=")[0] in CHOSEN:
                raise UserError(f"{override}: the proof itself chooses {', '.join(CHOSEN)}")
        base = check([*SMALL, *args.overrides])[0]
        if others := elsewhere(base):
            raise UserError(f"{others[0]}: its values are those of another program, and no proof of these layouts")
        whole, budget = product(base.device), budget_of(base)
        if args.sample is not None and not 0 < args.sample <= len(whole):
            raise UserError(f"--sample={args.sample}: must be in 1 .. {len(whole)}, the layouts there are")
        chosen = whole if args.all else few(base.device)[: args.first]
        if args.sample:
            chosen = random.sample(whole, args.sample)
        console.print(f"{len(chosen)} of {len(whole)} layouts")
        with scratch() as folder, Bar(console, "layouts") as bar:
            for layout in {_shape(layout) for layout in chosen}:
                from rl.prepare import prepare

                prepare(check([*SMALL, *args.overrides, *layout.overrides(folder / "run", budget)])[0])
            for row in prove(chosen, args.overrides, folder, budget):
                rows.append(row)
                if args.json:
                    write_atomic(args.json, json.dumps([asdict(r) for r in rows], indent=2) + "\n")
                bar(len(rows), len(chosen), row.sha256[:16] or "failed")
    except BAD_INPUT as error:
        fail(error, 2)
    console.print(table(rows))
    if reason := against(rows):
        fail(reason, 1)
    console.print("all equal: the layout changed no bit")


if __name__ == "__main__":
    with left_at_once(), interruptible():
        main(sys.argv[1:])
