"""`python -m rl.replay FOLDER [--sequences N] [--json FILE]`: the first layer and op at which sampler and trainer part.

FOLDER: a batch that a run kept (out_dir/batches/00000003), or the run itself, whose earliest one is taken. A run keeps the
batches of align.keep_batches=[3,7], and that of the first step in which a log-prob differs in a bit. The trainer's forward and
the sampler's are computed again, in this process, over the same tokens and the weights that sampled them; what every op of
every layer returned is compared, row by row, by its bytes. Exit code 0: nothing differs; 1: something does; 2: bad input.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from kernels.device import choose_device
from kernels.host.command import Parser, count, fail, output, threads, write_json
from rl.errors import BAD_INPUT, UserError
from rl.replay.kept import Kept, folders, read
from rl.replay.parting import Parting, element, part
from rl.replay.recording import Recording, Stage
from rl.replay.sides import Model, OpenWeights, sampler_side, trainer_side
from rl.run.screen import Screen, Waiting
from trainer.batch import Batch
from trainer.checkpoint import CheckpointError

NAMES = ("trainer", "sampler")


class Side(Protocol):
    """Computes a batch and records it; `watch`: a stage and a token whose rows are kept."""

    def __call__(self, *, watch: tuple[Stage, int] | None = None) -> Recording:
        """Returns the recording."""


def main(arguments: Sequence[str]) -> None:
    """Replays what the arguments name and says where the sides part."""
    parser = Parser(prog="python -m rl.replay", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--sequences", type=count, metavar="N", help="of the batch, the first N alone; default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: that of the run")
    parser.add_argument("--threads", type=threads, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--json", type=output, metavar="FILE", help="what was found, as JSON")
    asked = parser.parse_args(arguments)
    console = Screen()
    torch.set_num_threads(asked.threads)
    try:
        kept = one(asked.folder)
        device = asked.device or kept.device
        if device == "cuda":
            choose_device(device, console.print, kept.family)
        found = replay(replace(kept, device=device), console, asked.sequences)
    except (*BAD_INPUT, CheckpointError) as error:
        fail(error, 2)
    for line in found.told(NAMES):
        console.print(line)
    write_json(asked.json, {"where": found.where} | asdict(found))
    sys.exit(int(found.stage is not None))


def one(folder: Path) -> Kept:
    """Reads the kept batch that `folder` names: itself, or the earliest of a run. UserError where there is none."""
    found = folders(folder)
    if not found:
        raise UserError(f"{folder} keeps no batch: run with align.keep_batches=[STEP]")
    return read(found[0])


def replay(kept: Kept, console: Console, sequences: int | None = None) -> Parting:
    """Computes both sides of a batch again and returns where they part. Tells how far it is on `console`."""
    config = kept.model()
    batch = kept.batch.take(0, min(sequences or kept.batch.sequences, kept.batch.sequences))
    compared = "not trained on"
    if kept.trainer_logprobs is not None:
        compared = f"{kept.differing:,} of {len(kept.trainer_logprobs):,} log-probs differed"
    console.print(
        f"step {kept.step}: {batch.sequences} sequences, {len(batch.token_ids):,} tokens, {len(batch.rows):,} of them "
        f"sampled; when it was recorded {compared} (numerics={kept.numerics})",
        soft_wrap=True,
    )
    both = sides(Model(config, kept.dtype, kept.device), kept.weights, kept.weights, batch)
    return between(*both, batch, config.layers, console)


def sides(model: Model, trainer: OpenWeights, sampler: OpenWeights, batch: Batch) -> tuple[Side, Side]:
    """Returns the trainer's side and the sampler's, each with weights of its own (which are the same, unless something is
    wrong with one of them)."""
    return partial(trainer_side, model, trainer, batch), partial(sampler_side, model, sampler, batch)


def between(a: Side, b: Side, batch: Batch, layers: int, console: Console, names: tuple[str, str] = NAMES) -> Parting:
    """Records both sides and finds where they part; then records them once more, to show the values there."""
    with Waiting(console, f"computing the forward pass of {names[0]}"):
        first = a()
    with Waiting(console, f"computing the forward pass of {names[1]}"):
        second = b()
    found = part(first, second, batch, layers)
    if found.stage is None:
        return found
    watch = (found.stage, found.token)
    with Waiting(console, "computing both again, to show the values"):
        again = a(watch=watch), b(watch=watch)
    return replace(found, element=element(*again, names))
