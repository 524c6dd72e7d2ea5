"""python -m recipes.algorithms --out FILE: the default task by every algorithm and several seeds, as one table.

Each row is a run of `python -m rl.train` in a folder of its own under --runs. A run that fails is a row that says why, and the
others go on; the table (FILE, and FILE with .json in the place of its suffix) is written anew after each. The same command
again passes over the runs that are finished and goes on with those that are not. Exit code 1 where a run failed or a log-prob
differed.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kernels.host.command import Parser, count, fail, output, threads
from recipes.multi_gpu.command import ROOT
from rl.compose import check
from rl.errors import UserError
from rl.run.files import read_mapping, write_atomic
from rl.run.standing import standing

CASES: dict[str, tuple[str, ...]] = {  # name: what of the default run is another
    "grpo": ("algorithm=grpo",),
    "dapo": ("algorithm=dapo",),
    "dr_grpo": ("algorithm=dr_grpo",),
    "rloo": ("algorithm=grpo", "algorithm.advantage=rloo"),
    "reinforce_plus_plus": ("algorithm=reinforce_plus_plus",),
    "reinforce_plus_plus_baseline": ("algorithm=reinforce_plus_plus", "algorithm.baseline=group"),
    # On the first update of a batch these two are GRPO; the second tells them apart
    "gspo": ("algorithm=gspo", "algorithm.mini_batches=2"),
    "cispo": ("algorithm=cispo", "algorithm.mini_batches=2"),
    "grpo_kl": ("algorithm=grpo", "algorithm.kl_coef=0.01"),
    "reinforce_plus_plus_kl": (
        "algorithm=reinforce_plus_plus",
        *("algorithm.kl_coef=0.01", "algorithm.kl_in=reward", "algorithm.kl_estimator=k1"),
    ),
    "ppo": ("algorithm=ppo",),
    "grpo_entropy": ("algorithm=grpo", "algorithm.entropy_coef=0.003"),
    "distillation": ("algorithm=distillation",),
}
"""Algorithms as the table has them, in its order."""
TEACHERS = {"distillation": "grpo"}
"""Those that learn from a model: it is the one that another algorithm ended with, from the same seed."""


@dataclass(frozen=True)
class Case:
    """Names one run: an algorithm and a seed."""

    name: str
    seed: int
    folder: Path

    def beside(self, name: str) -> "Case":
        """Returns the case of another algorithm with the same seed."""
        return Case(name, self.seed, folder_of(self.folder.parent, name, self.seed))

    def arguments(self, each: int, overrides: Sequence[str]) -> list[str]:
        """Returns what `python -m` is told; `each`: threads of every process of the run."""
        own = [f"seed={self.seed}", f"out_dir={self.folder}", "logger=none"]
        if self.name in TEACHERS:
            own.append(f"algorithm.teacher={self.beside(TEACHERS[self.name]).folder / 'model'}")
        return ["rl.train", *CASES[self.name], *own, f"rollout.threads={each}", f"trainer.threads={each}", *overrides]


def folder_of(root: Path, name: str, seed: int) -> Path:
    """Names the folder of a run."""
    return root / f"{name}-seed{seed}"


@dataclass(frozen=True)
class Row:
    """Says how a run stands."""

    algorithm: str
    seed: int
    before: float | None  # held-out accuracy
    after: float | None
    steps: int
    differing: int  # log-probs of the sampler that are not the trainer's, of `compared`
    compared: int
    weights_sha256: str
    seconds: float | None
    error: str  # of a run that did not reach its end


def row(case: Case, error: str = "") -> Row:
    """Reads how the run of a case ended; `error`: why it did not."""
    found = standing(case.folder)
    numbers = (found.before, found.after, found.step, found.differing, found.compared)
    return Row(case.name, case.seed, *numbers, found.weights, found.seconds, error)


def finished(case: Case) -> bool:
    """Says whether an earlier command finished the run."""
    return bool(read_mapping(case.folder / "summary.json"))


def runs(cases: Sequence[Case], jobs: int, each: int, overrides: Sequence[str]) -> Iterator[Row]:
    """Does the runs, `jobs` at once, and yields each row when its run has ended. Leaves no process."""
    waiting, running = list(cases), dict[Case, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while len(running) < jobs and (ready := _ready(waiting, running)):
                waiting.remove(case := ready[0])
                running[case] = _start(case.arguments(each, overrides), _log(case))
            for case in [case for case, process in running.items() if process.poll() is not None]:
                code = running.pop(case).returncode
                yield row(case, _reason(_log(case), code) if code else "")
            time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()  # which ends its own processes
        for process in running.values():
            process.wait()


def _ready(waiting: Sequence[Case], running: Collection[Case]) -> list[Case]:
    """Returns those whose teacher is not still to come."""
    pending = {*waiting, *running}
    return [case for case in waiting if case.name not in TEACHERS or case.beside(TEACHERS[case.name]) not in pending]


def _log(case: Case) -> Path:
    return case.folder.with_name(f"{case.folder.name}.log")


def _start(arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=os.environ | {"PYTHONPATH": path, "COLUMNS": "160"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
        )


def _reason(log: Path, code: int) -> str:
    """Returns the line that says what was wrong."""
    said = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("samebit: error: ")]
    return (errors or said or [f"exit code {code}"])[-1].removeprefix("samebit: error: ")[:300]


def markdown(rows: Sequence[Row], about: dict[str, str]) -> str:
    """Makes the page: accuracy of each algorithm by seed, then every run."""
    seeds = sorted({r.seed for r in rows})
    after = {(r.algorithm, r.seed): "failed" if r.error else _share(r.after) for r in rows}
    names = list(dict.fromkeys(r.algorithm for r in rows))
    out = ["# Algorithms on the default task", "", f"`{about['command']}`, at {about['commit']}.", ""]
    out += ["Accuracy on held-out problems after the run:", "", _line(["", *(f"seed {s}" for s in seeds)])]
    out += [_line(["---"] * (len(seeds) + 1))]
    out += [_line([f"`{name}`", *(after.get((name, seed), "") for seed in seeds)]) for name in names]
    titles = ("algorithm", "seed", "accuracy", "steps", "log-probs that differ", "weights (SHA-256)", "s", "")
    out += ["", "Every run:", "", _line(titles), _line(["---"] * len(titles))]
    for r in rows:
        accuracy, gap = f"{_share(r.before)} to {_share(r.after)}", f"{r.differing:,} of {r.compared:,}"
        seconds, error = "" if r.seconds is None else f"{r.seconds:.0f}", r.error.replace("|", "\\|")
        cells = (f"`{r.algorithm}`", str(r.seed), accuracy, str(r.steps), gap, f"`{r.weights_sha256[:16]}`", seconds)
        out.append(_line([*cells, error]))
    out += ["", "What each is told beside the default run:", ""]
    return "\n".join([*out, *(f"- `{name}`: `{' '.join(CASES[name])}`" for name in names), ""])


def _share(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def against(rows: Sequence[Row]) -> str:
    """Says what speaks against the table; "" where all runs reached their end and no log-prob differed."""
    if failed := [r for r in rows if r.error]:
        return (
            f"{len(failed)} of {len(rows)} runs failed; {failed[0].algorithm}, seed {failed[0].seed}: {failed[0].error}"
        )
    differing = [r for r in rows if r.differing]
    return (
        f"{differing[0].algorithm}, seed {differing[0].seed}: {differing[0].differing} log-probs differ"
        if differing
        else ""
    )


def _commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or "not a git checkout"


def _parser() -> Parser:
    parser = Parser(prog="recipes.algorithms", description=(__doc__ or "").partition(":")[2].strip())
    parser.add_argument("overrides", nargs="*", help="of every run: steps=20 eval.problems=64 ...")
    parser.add_argument("--out", type=output, required=True, help="the table, in markdown; .json beside it")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument(
        "--jobs", type=count, default=1, help="runs at once; each has 4 processes unless told otherwise"
    )
    parser.add_argument("--threads", type=threads, default=1, help="of each of these processes")
    parser.add_argument(
        "--runs", type=Path, default=Path("outputs/algorithms"), help="where the folders of the runs are"
    )
    return parser


def main() -> None:
    """Does the runs that are not finished, and writes the table as they end."""
    args = _parser().parse_intermixed_args()
    names = args.only or list(CASES)
    folder = args.runs.absolute()
    cases = [Case(name, seed, folder_of(folder, name, seed)) for seed in args.seeds for name in names]
    try:
        for case in cases:
            check(case.arguments(args.threads, args.overrides)[1:])
    except UserError as error:
        fail(error, 2)
    about = {"command": " ".join(["python -m recipes.algorithms", *sys.argv[1:]]), "commit": _commit()}
    done = {case: row(case) for case in cases if finished(case)}
    rest = [case for case in cases if case not in done]
    print(f"{len(rest)} runs, {len(done)} are finished already; folders and logs: {folder}", flush=True)
    places = {(case.name, case.seed): case for case in cases}

    def write() -> list[Row]:
        rows = [done[case] for case in cases if case in done]
        write_atomic(args.out, markdown(rows, about))
        write_atomic(
            args.out.with_suffix(".json"), json.dumps(about | {"rows": [asdict(r) for r in rows]}, indent=1) + "\n"
        )
        return rows

    write()
    for r in runs(rest, args.jobs, args.threads, args.overrides):
        done[places[r.algorithm, r.seed]] = r
        write()
        said = r.error or f"accuracy {_share(r.before)} to {_share(r.after)}, {r.differing} of {r.compared:,} differ"
        print(f"{len(done)}/{len(cases)}  {r.algorithm}, seed {r.seed}: {said}", flush=True)
    if reason := against(write()):
        fail(reason, 1)
