"""`python -m rl.prove`: whole runs in many layouts, and the table of their hashes.

Each row is a run as `rl.train` makes it (warm start, sampling, scoring, training, publishing) on a small model. What a layout
changes (FSDP world size, micro-batch, tensor-parallel size, engines, a SIGKILL and a resume) must change no bit, so all rows
of a dtype show one SHA-256; exit code 1 where they do not. By default a few layouts that cover the values; --all: the product.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rl.align import AlignmentError
from rl.bar import Bar
from rl.cluster import session
from rl.compose import ROOT, check
from rl.errors import BAD_INPUT, RunError, UserError
from rl.log import write_atomic
from trainer.command import Parser, fail

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
CHOSEN = ("trainer.world_size", "trainer.micro_leaves", "rollout.tp", "rollout.replicas", "model.dtype", "out_dir")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Layout:
    dtype: str
    world_size: int  # FSDP ranks
    micro_leaves: int  # leaves of the gradient's tree in one micro-batch
    tp: int
    replicas: int
    killed: bool  # with SIGKILL, in another layout, and resumed in this one

    def overrides(self, out_dir: Path) -> list[str]:
        values = (self.world_size, self.micro_leaves, self.tp, self.replicas, self.dtype, out_dir)
        return [f"{key}={value}" for key, value in zip(CHOSEN, values, strict=True)]

    def other(self) -> "Layout":
        """The layout that a killed run began in."""
        return replace(self, world_size=3 - self.world_size if self.world_size < 3 else 2, micro_leaves=2, replicas=1)


@dataclass(frozen=True)
class Row:
    layout: Layout
    sha256: str  # of the trained weights; empty where the run failed
    compared: int  # log-probs, sampler against trainer
    differing: int
    seconds: float
    error: str


def layouts(whole: bool) -> list[Layout]:
    """The product, or a few of it in which every value occurs, in both dtypes."""
    if whole:
        product = itertools.product(DTYPES, (1, 2, 4), (1, 2, 4), (1, 2, 4), (1, 2), (False, True))
        return [Layout(*values) for values in product]
    more = [(1, 1, 1, 1, False), (2, 1, 4, 1, False), (4, 2, 4, 1, False)]  # of float32 alone
    both = [(1, 2, 2, 2, False), (2, 4, 1, 1, True), (4, 1, 4, 1, False)]
    return [Layout("float32", *v) for v in (*more, *both)] + [Layout("bfloat16", *v) for v in both]


def prove(chosen: Sequence[Layout], overrides: Sequence[str], folder: Path) -> Iterator[Row]:
    """One run after the other, under one Ray."""
    first = check([*SMALL, *overrides])[0]
    with session(first.cluster, 4):
        for i, layout in enumerate(chosen):
            yield _row(layout, overrides, folder / str(i))


def _row(layout: Layout, overrides: Sequence[str], out_dir: Path) -> Row:
    from rl.loop import run

    start, error = time.perf_counter(), ""
    summary: dict[str, Any] = {"weights_sha256": "", "tokens_compared": 0, "tokens_nonzero": 0}
    try:
        if layout.killed:
            _killed([*SMALL, *overrides, *layout.other().overrides(out_dir)], out_dir)
        config = check([*SMALL, *overrides, *layout.overrides(out_dir)])[0]
        summary = run(config, Console(quiet=True))
    except (RunError, AlignmentError) as stopped:
        error = str(stopped)
    seconds = round(time.perf_counter() - start, 1)
    return Row(layout, summary["weights_sha256"], summary["tokens_compared"], summary["tokens_nonzero"], seconds, error)


def _killed(overrides: Sequence[str], out_dir: Path) -> None:
    """A run of its own process, killed once GRPO has begun and a checkpoint is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rl.train", *overrides],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
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
    out = Table(title="One run in many layouts: SHA-256 of the trained weights", title_justify="left")
    for name in ("dtype", "FSDP", "micro", "TP", "engines", "killed", "log-probs ≠", "s", "weights"):
        out.add_column(name, justify="left" if name in ("dtype", "killed", "weights") else "right")
    for row in rows:
        lay = row.layout
        cells = (lay.dtype, lay.world_size, lay.micro_leaves, lay.tp, lay.replicas, "yes" if lay.killed else "")
        weights = row.sha256[:12] or f"failed: {row.error}"
        out.add_row(*map(str, cells), f"{row.differing}/{row.compared}", f"{row.seconds:.0f}", weights)
    return out


def equal(rows: Sequence[Row]) -> bool:
    """No run failed, no log-prob differed, and every dtype has one hash."""
    return all(
        row.sha256
        and not row.differing
        and row.sha256 == next(r for r in rows if r.layout.dtype == row.layout.dtype).sha256
        for row in rows
    )


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="rl.prove", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("overrides", nargs="*", help="of the small run: device=cuda steps=5 seed=1 ...")
    parser.add_argument(
        "--all", action="store_true", help="every layout of the product, not a few that cover its values"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args(arguments)
    console = Console(highlight=False)
    rows: list[Row] = []
    try:
        for override in args.overrides:
            if override.lstrip("+").partition("=")[0] in CHOSEN:
                raise UserError(f"{override}: the proof itself chooses {', '.join(CHOSEN)}")
        if args.json and not args.json.absolute().parent.is_dir():
            raise UserError(f"--json={args.json}: no such folder")
        chosen = layouts(args.all)
        total = len(layouts(True))
        console.print(
            f"{len(chosen)} of {total} layouts" + ("" if args.all else ": all values, not all combinations (--all)")
        )
        with tempfile.TemporaryDirectory() as folder, Bar(console, "layouts") as bar:
            for layout in chosen:
                from rl.loop import prepare

                prepare(check([*SMALL, *args.overrides, *layout.overrides(Path(folder) / "run")])[0])
            for row in prove(chosen, args.overrides, Path(folder)):
                rows.append(row)
                bar(len(rows), len(chosen), row.sha256[:16] or "failed")
    except BAD_INPUT as error:
        fail(error, 2)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    console.print(table(rows))
    if args.json:
        write_atomic(args.json, json.dumps([asdict(r) for r in rows], indent=2) + "\n")
    if not equal(rows):
        fail("the hashes differ: the layout changed the run", 1)
    console.print("all equal: the layout changed no bit")


if __name__ == "__main__":
    main(sys.argv[1:])
