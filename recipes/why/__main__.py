"""`python -m recipes.why --out DIR [--seeds 0 1 2 3 4] [--jobs N] [--threads N] [key=value ...]`: exact and inexact.

The small model of the main job learns to sort four numbers: responses of 32 tokens in place of 3, in bfloat16, with eight
updates on each batch (four mini-batches, twice), on a CPU or with device=cuda on a GPU. Once with `numerics=exact`, once with
`numerics=fast` (torch's matmul in sampler and trainer, its attention and log-prob in the trainer), with every seed. Keys of
rl.train change both alike (steps=50).

DIR holds a folder of each run, why.json (gap of log-probs, reward, entropy and gradient norm of every step) and why.svg (their
means over the seeds), which are written anew after every run: a run that fails is named, and the others go on. The same command
goes on with what is not finished. Exit code 1 where a run failed; 2: bad input.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from kernels.host.command import Parser, count, fail, interruptible, threads
from recipes.why.record import ARMS, Run, write
from rl.compose import ROOT, check
from rl.data import open_source
from rl.errors import BAD_INPUT
from rl.model import model_config
from rl.train import compile_kernels

TASK = (
    "data=reasoning_gym",
    "data.task=number_sorting",
    "data.args={min_numbers: 4, max_numbers: 4, min_decimals: 0, max_decimals: 0, min_value: 0, max_value: 99}",
    r"data.pattern='(?s)Sort these numbers in ascending order: (.*?)\n.*'",
    "data.prompt='{0}='",
    "data.problems=4000",
    "rollout.max_new_tokens=40",
    "model.dtype=bfloat16",
    "algorithm.mini_batches=4",
    "algorithm.update_epochs=2",
    "trainer.micro_leaves=2",
    "eval.problems=256",
    "logger=none",
    "save_model=false",
    "checkpoint.keep=1",
)


@dataclass(frozen=True)
class Asked:
    """Holds the command's arguments."""

    out: Path
    seeds: list[int]
    jobs: int
    threads: int
    overrides: list[str]


def arguments(given: Sequence[str]) -> Asked:
    """Parses the arguments; bad ones exit with 2."""
    parser = Parser(prog="python -m recipes.why", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at a time; default 1")
    parser.add_argument(
        "--threads", type=threads, default=1, metavar="N", help="of each process; a run has four; default 1"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of rl.train")
    return Asked(**vars(parser.parse_intermixed_args(given)))


def overrides(asked: Asked, arm: str, seed: int) -> list[str]:
    """Returns the keys of one run."""
    own = [f"seed={seed}", f"numerics={arm}", f"out_dir={folder(asked, arm, seed)}"]
    size = [f"rollout.threads={asked.threads}", f"trainer.threads={asked.threads}"]
    return [*TASK, *size, *asked.overrides, *own]


def folder(asked: Asked, arm: str, seed: int) -> Path:
    """Returns the folder of one run."""
    return (asked.out / f"{arm}-{seed}").resolve()


def run(asked: Asked, arm: str, seed: int) -> str:
    """Does one run, if it is not done; returns what went wrong, or ""."""
    there = folder(asked, arm, seed)
    if (there / "summary.json").exists():
        return ""
    there.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "rl.train", *overrides(asked, arm, seed)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with open(asked.out / f"{arm}-{seed}.log", "w") as log:
        done = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=asked.out, env=os.environ | {"PYTHONPATH": path}
        )
    if done.returncode == 0:
        return ""
    last = Path(log.name).read_text(errors="replace").strip().splitlines()[-1:]
    return f"exit code {done.returncode}: {last[0] if last else 'it said nothing'} ({log.name})"


def main(given: Sequence[str]) -> int:
    """Does all runs, and draws what they left; returns the exit code."""
    asked = arguments(given)
    try:
        configs = [check(overrides(asked, arm, asked.seeds[0]))[0] for arm in ARMS]
        asked.out.mkdir(parents=True, exist_ok=True)
        if asked.jobs > 1 and configs[0].device == "cuda":  # once, and not by every run at the same time
            for config in configs:
                compile_kernels(config, model_config(config, len(open_source(config).tokenizer)), print)
    except (*BAD_INPUT, OSError) as error:
        fail(error, 2)
    wanted = [Run(arm, seed, folder(asked, arm, seed)) for seed in dict.fromkeys(asked.seeds) for arm in ARMS]
    failed = 0
    print(f"{len(wanted)} runs, {asked.jobs} at a time, {asked.threads} thread(s) a process; each says how far it is in "
          f"{asked.out}/ARM-SEED/train.log", flush=True)  # fmt: skip
    with ThreadPoolExecutor(asked.jobs) as pool:
        going = {pool.submit(_timed, asked, one): one for one in wanted}
        for number, future in enumerate(as_completed(going), 1):
            one, (seconds, wrong) = going[future], future.result()
            failed += bool(wrong)
            said = f"FAILED: {wrong}" if wrong else f"done in {seconds:.0f} s"
            print(f"{number} of {len(wanted)}: {one.arm}, seed {one.seed}: {said}", flush=True)
            write(wanted, asked.out)
    print(f"{asked.out / 'why.svg'}, {asked.out / 'why.json'}: {len(wanted) - failed} of {len(wanted)} runs finished")
    return int(failed > 0)


def _timed(asked: Asked, one: Run) -> tuple[float, str]:
    begun = time.monotonic()
    try:
        wrong = run(asked, one.arm, one.seed)
    except Exception as error:  # of a disk that is full, say: the others go on
        wrong = f"{type(error).__name__}: {error}"
    return time.monotonic() - begun, wrong


if __name__ == "__main__":
    with interruptible():
        sys.exit(main(sys.argv[1:]))
