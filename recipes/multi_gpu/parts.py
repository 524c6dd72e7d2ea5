"""What each part runs, and what it must show. A part is a generator of rows, so that what was measured before a failure is
kept."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from kernels.model import costs
from recipes.multi_gpu.command import Ended, Running, run
from recipes.multi_gpu.engine import model

PATIENCE = 30.0
"""Seconds within which a dead rank must end its run."""
PLACEMENTS = ("colocated", "split")
PHASES = ("handover", "sample", "score", "train", "publish")
Figure = float | int | str


@dataclass(frozen=True)
class Setting:
    """Says what the parts run on, and how much."""

    folder: Path  # for logs: small
    runs: Path  # for the folders of runs: gigabytes, removed at the end
    cards: int
    layers: int  # of Qwen3-8B's 36
    steps: int
    prompts: int  # of a step, each sampled 8 times
    new_tokens: int
    data: Path
    limit: float  # seconds that one command may take
    until: float  # of time.monotonic(): when all of them must have ended
    fast: bool  # also numerics=fast
    quick: bool = False  # fewer cases
    gib: float = 79.0  # memory of a card

    @property
    def seconds(self) -> float:
        """Returns how long a command which starts now may take."""
        return max(1.0, min(self.limit, self.until - time.monotonic()))


@dataclass(frozen=True)
class Row:
    """Says how one thing that was run ended."""

    part: str
    case: str
    ok: bool
    seconds: float
    command: str
    figures: dict[str, Figure] = field(default_factory=dict)
    note: str = ""  # of a failure


def tests(s: Setting) -> Iterator[Row]:
    """Tests collectives and whole runs over NCCL and peer memory: the bits of one rank, and the recorded hash."""
    command = ["pytest", "-m", "multi_gpu", "-q", "-n", "4", "--dist", "loadfile", "-rs", "tests/multi_gpu"]
    ended = run(command, s.folder / "tests.log", s.seconds)
    counts = dict((kind, int(n)) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", ended.last))
    good = ended.code == 0 and counts.get("passed", 0) > 0
    yield _row("tests", "pytest -m multi_gpu", good, command, ended, dict(counts))


def collectives(s: Setting) -> Iterator[Row]:
    """Times the tree sums beside NCCL's; one that has not the bits of the fold is not timed."""
    out = s.folder / "collectives.json"
    command = ["kernels.collectives.bench", "--ranks", str(s.cards), "--json", str(out)]
    ended = run(command, s.folder / "collectives.log", s.seconds)
    if ended.code != 0:
        yield _row("collectives", "tree against NCCL", False, command, ended)
        return
    for measured in json.loads(out.read_text())["rows"]:
        figures = {f"{name}, us": round(measured[name], 1) for name in ("NCCL", "peers", "over NCCL")}
        figures["NCCL / peers"] = round(measured["NCCL"] / measured["peers"], 2)
        yield _row("collectives", f"{measured['sum']}, {measured['n']}", True, command, ended, figures)


def engine(s: Setting) -> Iterator[Row]:
    """Counts tokens per second at each TP; the completions and log-probs of all are those of TP=1."""
    alone: dict[str, float] = {}
    for tp in (1 << i for i in range(s.cards.bit_length())):
        out = s.runs / f"engine-{tp}.json"
        command = ["recipes.multi_gpu.engine", f"--tp={tp}", f"--layers={s.layers}", f"--json={out}"]
        command += ["--same-as", str(s.runs / "engine-1.json")] if tp > 1 else []
        command += ["--batches", "1", "64"] if s.quick else []
        ended = run(command, s.folder / f"engine-{tp}.log", s.seconds)
        if ended.code != 0:
            yield _row("engine", f"TP {tp}, {s.layers} layers", False, command, ended)
            return
        rates = json.loads(out.read_text())["rates"]
        alone = alone or rates
        for batch, rate in rates.items():
            figures: dict[str, Figure] = {"tokens/s": round(rate), "of ideal": round(rate / alone[batch] / tp, 2)}
            yield _row("engine", f"TP {tp}, {s.layers} layers, batch {batch}", True, command, ended, figures)


def publish(s: Setting) -> Iterator[Row]:
    """Times the publication of the whole Qwen3-8B, from the trainer's shards to the engines', with their fingerprints
    compared."""
    for placement in PLACEMENTS[s.quick :]:
        ranks = s.cards if placement == "colocated" else s.cards // 2
        out = s.folder / f"publish-{placement}.json"
        command = [
            "rl.bench_publish",
            "model=qwen3_8b",
            "device=cuda",
            *_ranks(ranks),
            f"cluster.placement={placement}",
        ]
        command += ["--json", str(out)]
        ended = run(command, s.folder / f"publish-{placement}.log", s.seconds)
        if ended.code != 0:
            yield _row("publish", placement, False, command, ended)
            continue
        for measured in json.loads(out.read_text())["rows"]:
            figures: dict[str, Figure] = {f"{name}, s": round(measured[name], 3) for name in ("median", "most")}
            figures["GB/s"] = "" if measured["rate"] is None else round(measured["rate"], 1)
            yield _row("publish", f"{placement}, {measured['name']}", True, command, ended, figures)


def recipe(s: Setting) -> Iterator[Row]:
    """Takes whole steps of grpo_qwen3_8b: exact, their times, the memory of the cards, and the same with the vendor's
    kernels."""
    for placement in PLACEMENTS:
        exact = 0.0
        contrast = s.fast and not (s.quick and placement == "split")
        for numerics in ("exact", "fast") if contrast else ("exact",):
            out_dir = s.runs / f"{placement}-{numerics}"
            command = recipe_command(s, placement, numerics, out_dir)
            ended = run(command, s.folder / f"{out_dir.name}.log", s.seconds)
            times, figures = phases(out_dir), dict[str, Figure]()
            if times:
                whole = sum(times.values())
                exact = exact or whole
                figures = {f"{phase}, s": round(seconds, 2) for phase, seconds in times.items()}
                figures |= {"step, s": round(whole, 2), "of exact": round(whole / exact, 3)}
                figures["most GiB of a card"] = " / ".join(map(str, ended.gib))
            good = ended.code == 0 and learned(out_dir)
            if ended.code == 0:
                summary = _summary(out_dir)
                figures |= {"log-probs ≠": f"{summary['tokens_nonzero']} of {summary['tokens_compared']}"} | _hash(
                    out_dir
                )
                good = good and (numerics == "fast" or summary["tokens_nonzero"] == 0)
            case = f"{placement}, numerics={numerics}, {s.layers} layers"
            yield _row("recipe", case, good, command, ended, figures)


def kill(s: Setting) -> Iterator[Row]:
    """Kills a rank in a step: its run ends in time and names it; resumed it ends with the weights of an undisturbed run."""
    with ThreadPoolExecutor() as pool:  # on different cards, or the same: nothing is timed but the end
        untouched = pool.submit(_untouched, s)
        chains = [pool.submit(_killed_and_resumed, s, name) for name in ("TrainerRank", "RolloutRank")]
        whole, expected = untouched.result()
        yield whole
        for chain in chains:
            rows, found = chain.result()
            yield from rows[:-1]
            yield replace(rows[-1], ok=rows[-1].ok and found == expected)


def _untouched(s: Setting) -> tuple[Row, dict[str, Figure]]:
    out_dir = s.runs / "untouched"
    command = kill_command(s, 1, out_dir)
    ended = run(command, s.folder / "untouched.log", s.seconds)
    good, found = ended.code == 0 and learned(out_dir), _hash(out_dir)
    return _row("kill", "nobody is killed, one card each", good, command, ended, found), found


def _killed_and_resumed(s: Setting, name: str) -> tuple[list[Row], dict[str, Figure]]:
    out_dir = s.runs / f"killed-{name}"
    command = kill_command(s, s.cards, out_dir)
    killed = _kill_one(s, command, out_dir, name)
    ended = run(command, s.folder / f"resumed-{name}.log", s.seconds)
    good = ended.code == 0 and "resumed" in ended.output
    return [killed, _row("kill", "resumed: the same weights", good, command, ended, _hash(out_dir))], _hash(out_dir)


def _kill_one(s: Setting, command: list[str], out_dir: Path, name: str) -> Row:
    """Kills the last rank of `name` in a step that begins with a checkpoint on the disk, in the middle of its work as the steps
    before show it."""
    with Running(command, s.folder / f"kill-{name}.log") as running:
        until, seen = time.monotonic() + s.seconds, 0
        while running.process.poll() is None and time.monotonic() < until:
            done = len(_steps(out_dir))
            if 0 < seen < done:
                break
            if done > 1 and not seen and any(out_dir.glob("checkpoints/step-*")):
                seen = done
            time.sleep(0.01)
        if times := phases(out_dir):
            begun = times["handover"] + times["sample"]
            time.sleep(begun + times["train"] / 2 if name == "TrainerRank" else begun - times["sample"] / 2)
        ranks = running.ranks(name)
        if ranks and running.process.poll() is None:
            os.kill(ranks[-1], signal.SIGKILL)
        killed = time.monotonic()
        ended = running.finish(2 * PATIENCE)
    took = time.monotonic() - killed
    who = {"TrainerRank": "trainer rank", "RolloutRank": "rollout engine"}[name]
    good = bool(ranks) and ended.code == 1 and f"error: {who}" in ended.last and took < PATIENCE
    figures: dict[str, Figure] = {"ended after, s": round(took, 1), "it says": ended.last[:120]}
    return _row("kill", f"{who} killed in step {len(_steps(out_dir)) + 1}", good, command, ended, figures)


PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "tests": tests,
    "collectives": collectives,
    "engine": engine,
    "publish": publish,
    "recipe": recipe,
    "kill": kill,
}


STAGES = (("recipe",), ("tests", "kill"), ("engine",), ("publish",), ("collectives",))
"""One after the other; what is not timed runs side by side."""


def recipe_command(s: Setting, placement: str, numerics: str, out_dir: Path) -> list[str]:
    """Returns the command of a run with both sides on all cards, or the trainer on one half of them and one engine or more on
    the other."""
    ranks = s.cards if placement == "colocated" else s.cards // 2
    command = ["rl.train", "+recipe=grpo_qwen3_8b", *_small(s), f"model.hf.num_hidden_layers={s.layers}"]
    command += ["trainer.micro_tokens=40960", f"trainer.checkpointing={'layer' if s.layers > 18 else 'none'}"]
    command += [*_ranks(ranks), f"cluster.placement={placement}", f"trainer.offload={_offload(s, ranks)}"]
    command += ["checkpoint.every=0", f"numerics={numerics}"]
    return [*command, f"out_dir={out_dir}"]


def _offload(s: Setting, ranks: int) -> str:
    """The least that leaves room for 32 GiB of activations on each card."""
    for offload, bytes_each in (("none", 16), ("optimizer", 8)):
        if costs.parameter_count(model(s.layers)) * bytes_each / ranks / 2**30 + 32 < 0.9 * s.gib:
            return offload
    return "all"


def kill_command(s: Setting, ranks: int, out_dir: Path) -> list[str]:
    """Returns the command of a run of Qwen3-0.6B's widths in 8 layers; `ranks` of the trainer and of one engine or more, on as
    many cards."""
    small = replace(s, steps=12)  # long enough for a checkpoint to be written meanwhile
    command = ["rl.train", "+recipe=grpo_qwen3_0p6b", *_small(small), "model.hf.num_hidden_layers=8"]
    return [*command, *_ranks(ranks), "checkpoint.every=1", f"out_dir={out_dir}"]


def _small(s: Setting) -> list[str]:
    sizes = {
        "steps": s.steps,
        "logger": "none",
        "save_model": "false",
        "algorithm.prompts_per_step": s.prompts,
        "rollout.max_new_tokens": s.new_tokens,
        "rollout.pages": s.prompts * 8 * -(-(s.new_tokens + 256) // 16),
        "trainer.leaf_sequences": 4,
        "eval.problems": 8,
        "reward": "recipes.multi_gpu.problems:coin",
        "data.path": s.data,
    }
    return [f"{key}={value}" for key, value in sizes.items()]


def _ranks(count: int) -> list[str]:
    tp = min(2, count)
    return [f"trainer.world_size={count}", f"rollout.tp={tp}", f"rollout.replicas={count // tp}"]


def _row(
    part: str, case: str, ok: bool, command: list[str], ended: Ended, figures: dict[str, Figure] | None = None
) -> Row:
    if ok:
        note = ""
    elif ended.code is None:
        note = f"not done after {ended.seconds:.0f} s: {ended.last}"
    elif ended.code == 0:
        note = f"it ran, and does not show what it must: {ended.last}"
    else:
        note = f"exit code {ended.code}: {ended.last}"
    return Row(part, case, ok, round(ended.seconds, 1), " ".join(["python -m", *command]), figures or {}, note)


def _summary(out_dir: Path) -> dict:
    return json.loads((out_dir / "summary.json").read_text())


def _hash(out_dir: Path) -> dict[str, Figure]:
    done = (out_dir / "summary.json").exists()
    return {"weights": _summary(out_dir)["weights_sha256"][:12]} if done else {}


def _steps(out_dir: Path) -> list[dict]:
    """The logged GRPO steps."""
    log = out_dir / "metrics.jsonl"
    whole = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []
    return [row for row in map(json.loads, whole) if "time/train" in row and "grpo/step" in row]


def learned(out_dir: Path) -> bool:
    """Tells whether any step had a gradient: else every run ends with the weights it began with."""
    return any(row["policy/grad_norm"] > 0 for row in _steps(out_dir))


def phases(out_dir: Path) -> dict[str, float]:
    """Computes the mean seconds of each phase, of all steps but the first, which compiles."""
    rows = _steps(out_dir)[1:]
    return {p: sum(r[f"time/{p}"] for r in rows) / len(rows) for p in PHASES} if rows else {}
