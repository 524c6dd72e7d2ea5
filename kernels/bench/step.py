"""`python -m rl.bench_step [--json FILE] [OVERRIDES]`: a whole step of GRPO (sampling, scoring, training, publishing) in four
modes: synchronous, speculating, overlapping, both.

The overrides are those of `rl.train`: +recipe=grpo_qwen3_8b model.hf.num_hidden_layers=8 cluster.placement=split ... Each mode
is a whole run of as many steps, and all begin with the same weights. Counted are the steps between the first ones, in which
kernels are loaded and steps are drawn ahead, and the last ones, in which nothing is any more. Speculation must change no bit:
where a run with it ends with other weights than the one without, the exit code is 1. That says something where the weights
change: with a reward that the model earns.

Beside them stands what a training step takes in `transformers` with SDPA, of as many sequences of the mean length: a forward
pass for the old log-probs, then forward, backward and AdamW. (Ours needs no first one: the sampler's log-probs are its own.)
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from kernels.bench.table import console, show
from kernels.bench.timer import samples
from kernels.device import UnsupportedError, choose_device
from kernels.host.command import Parser, count, fail, output, write_json
from kernels.model import ModelConfig
from kernels.scratch import scratch
from rl.align import AlignmentError
from rl.cluster import session
from rl.compose import check
from rl.config import RunConfig
from rl.data import open_source
from rl.errors import BAD_INPUT, RunError, UserError
from rl.model import model_config
from rl.report import read_lines
from rl.run.screen import Screen

SPECULATING, OVERLAPPING = "rollout.speculate", "algorithm.lag"
MODES = ("synchronous", "speculating", "overlapping", "both")
OWN = ("checkpoint.every=0", "save_model=false", "logger=none", "eval.problems=1", "eval.every=0")
CHOSEN = (SPECULATING, OVERLAPPING, "steps", "out_dir", *(key.partition("=")[0] for key in OWN))
SHOWN = ("step", "sample", "train", "publish", "prove", "step_over_longer_half")


@dataclass(frozen=True)
class Row:
    """Holds what the counted steps of a mode took, in the mean."""

    mode: str
    seconds: dict[str, float]  # of a step and its phases, by the names of the metrics
    tokens: float  # of prompts and responses a step
    tokens_per_s: float  # of a step, for each card (on a CPU: of all)
    sha256: str  # of the weights at the end
    differing: int  # log-probs


def overrides_of(mode: str, lag: int) -> list[str]:
    """Returns the overrides that make a run one of a mode."""
    speculate = "auto" if mode in ("speculating", "both") else "off"
    return [f"{SPECULATING}={speculate}", f"{OVERLAPPING}={lag if mode in ('overlapping', 'both') else 0}"]


def cards(config: RunConfig) -> int:
    """Counts the cards of a run; on a CPU 1."""
    if config.device == "cpu":
        return 1
    sides = config.trainer.world_size, config.rollout.tp * config.rollout.replicas
    return sum(sides) if config.cluster.placement == "split" else min(max(sides), torch.cuda.device_count())


def of_steps(mode: str, config: RunConfig, metrics: Sequence[dict[str, Any]], summary: dict[str, Any], lag: int) -> Row:
    """Makes a row of the rows of a run's log, without its first and last steps."""
    steps = [row for row in metrics if "grpo/step" in row][lag + 1 : -lag]
    names = dict.fromkeys(name for row in steps for name, x in row.items() if name.startswith("time/") and _number(x))
    seconds = {name.partition("/")[2]: statistics.fmean(row.get(name, 0.0) for row in steps) for name in names}
    tokens = [row["speed/step_tokens_per_s"] * row["time/step"] for row in steps]
    speed = sum(tokens) / sum(row["time/step"] for row in steps) / cards(config)
    return Row(mode, seconds, statistics.fmean(tokens), speed, summary["weights_sha256"], summary["tokens_nonzero"])


def _number(value: Any) -> bool:
    return isinstance(value, float | int)


def against(rows: Sequence[Row]) -> str:
    """Says what speaks against the rows: log-probs that differ, or weights that speculation changed; "" where nothing does."""
    if differing := sum(row.differing for row in rows):
        return f"{differing} log-probs of the sampler are not the trainer's"
    hashes = {row.mode: row.sha256 for row in rows}
    for plain, drafting in (("synchronous", "speculating"), ("overlapping", "both")):
        if {plain, drafting} <= hashes.keys() and hashes[plain] != hashes[drafting]:
            return f"{drafting} ended with other weights than {plain}: {hashes[drafting][:12]}, {hashes[plain][:12]}"
    return ""


class Theirs:
    """Takes training steps in `transformers`: the old log-probs by a forward pass of their own, forward, backward, AdamW."""

    def __init__(self, model: ModelConfig, config: RunConfig, length: int) -> None:
        """`length`: tokens of each sequence."""
        transformers.utils.logging.set_verbosity_error()
        section, dtype = config.trainer, config.dtype
        known = transformers.AutoConfig.for_model(**model.to_hf(str(dtype).removeprefix("torch.")))
        torch.set_default_dtype(dtype)
        with torch.device(config.device):
            self.model = transformers.AutoModelForCausalLM.from_config(known, attn_implementation="sdpa").train()
        torch.set_default_dtype(torch.float32)
        if section.checkpointing != "none":
            self.model.gradient_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=config.device == "cuda")
        sequences = config.algorithm.prompts_per_step * config.algorithm.group_size // section.world_size
        of_leaves = section.leaf_sequences * section.micro_leaves
        self.ids = torch.randint(model.vocab_size, (sequences, length), device=config.device)
        self.micro = max(1, section.micro_tokens // length if section.micro_tokens else of_leaves)

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the log-prob of every token but the first of a sequence."""
        logits = self.model(ids, use_cache=False).logits[:, :-1].float()
        return -torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")

    def step(self) -> None:
        """Takes one step on all sequences."""
        parts = self.ids.split(self.micro)
        with torch.no_grad():
            old = [self.logprobs(part) for part in parts]
        for part, before in zip(parts, old, strict=True):
            (-(self.logprobs(part) - before).exp().sum() / self.ids.numel()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the arguments, or ends with one line."""
    parser = Parser(
        prog="python -m rl.bench_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=output, help="write the rows to this file, as they come")
    parser.add_argument("--steps", type=count, default=3, help="that are counted in each mode")
    parser.add_argument("--lag", type=count, default=1, help="steps that sampling is ahead where it overlaps")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the modes and prints their table; exits with 1 where speculation changed a bit, with 2 for bad input."""
    args, out = parsed(arguments), console()
    rows: list[Row] = []
    try:
        for override in args.overrides:
            if override.lstrip("+").partition("=")[0] in CHOSEN:
                raise UserError(f"{override}: the benchmark itself chooses {', '.join(CHOSEN)}")
        config = check([*args.overrides, *OWN, "out_dir=unused"])[0]
        choose_device(config.device, out.print, config.kernels.family)
        with scratch() as folder:
            processes = config.trainer.world_size + config.rollout.replicas * config.rollout.tp
            with session(config.cluster, processes, folder / "train.log"):
                for mode in args.modes:
                    rows.append(_run(mode, args, folder / mode))
                    write_json(args.json, {"rows": [asdict(row) for row in rows]})
                    out.print(f"{mode}: {rows[-1].seconds['step']:.2f} s a step")
        theirs = None if args.no_peer else _theirs(config, rows[0], args.steps)
        write_json(args.json, {"rows": [asdict(row) for row in rows], "transformers_seconds": theirs})
    except (*BAD_INPUT, UnsupportedError) as error:
        fail(error, 2)
    except (RunError, AlignmentError) as error:
        fail(error, 1)
    _show(rows, theirs, config)
    if reason := against(rows):
        fail(reason, 1)


def _run(mode: str, args: argparse.Namespace, out_dir: Path) -> Row:
    from rl.train import train

    steps = args.steps + 2 * args.lag + 1
    own = [*OWN, *overrides_of(mode, args.lag), f"steps={steps}", f"out_dir={out_dir}"]
    config = check([*args.overrides, *own])[0]
    summary = train(config, Screen(quiet=True))
    return of_steps(mode, config, read_lines(out_dir / "metrics.jsonl"), summary, args.lag)


def _theirs(config: RunConfig, row: Row, steps: int) -> float:
    """Times a training step of one rank of theirs, in seconds."""
    model = model_config(config, len(open_source(config).tokenizer))
    sequences = config.algorithm.prompts_per_step * config.algorithm.group_size
    if config.device == "cpu":
        torch.set_num_threads(config.trainer.threads)
    work = Theirs(model, config, max(2, round(row.tokens / sequences))).step
    return statistics.median(samples(work, steps, on_gpu=config.device == "cuda"))


def _show(rows: Sequence[Row], theirs: float | None, config: RunConfig) -> None:
    first = rows[0]
    lines = [
        (
            row.mode,
            *(f"{row.seconds[name]:.2f}" if name in row.seconds else "" for name in SHOWN),
            f"{row.tokens_per_s:,.0f}",
            f"{first.seconds['step'] / row.seconds['step']:.2f}",
            row.sha256[:12],
        )
        for row in rows
    ]
    title = (
        f"A step of GRPO on {config.device}, {config.cluster.placement}, {config.trainer.world_size} trainer rank(s), "
        f"{config.rollout.replicas} engine(s) x tp {config.rollout.tp}: seconds in the mean, {first.tokens:,.0f} tokens a step"
    )
    heads = (
        "step",
        "sample",
        "train",
        "publish",
        "prove",
        "step / longer half",
        "tokens/s a card",
        f"{first.mode} / mode",
        "weights",
    )
    out = console()
    show(out, ("",), heads, lines, title)
    if theirs:
        ours = first.seconds["train"]
        out.print(
            f"training alone, a rank: ours {ours:.2f} s; transformers {transformers.__version__} with SDPA, and a forward pass "
            f"for the old log-probs before it, {theirs:.2f} s: {theirs / ours:.2f} of ours"
        )
