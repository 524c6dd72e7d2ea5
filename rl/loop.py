"""The run: warm start, evaluation, GRPO steps, evaluation, and what it leaves behind."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kernels.model import ModelConfig
from kernels.model.weights import digest
from rl import align
from rl.cluster import RolloutFleet, TrainerFleet, cluster
from rl.config import RunConfig
from rl.data import Judge, ProblemStream, Source, open_source
from rl.errors import UserError
from rl.log import RunLog
from rl.metrics import divergence
from rl.model import model_config
from rl.pack import pack, pack_supervised
from rl.plan import Plan, check_machine, make_plan, print_plan
from rl.report import write_report
from rl.requests import requests_for
from rl.score import Group, group, judge_of, score
from trainer.batch import Batch, StepReport

_TRAIN, _WARMUP = 0, 1  # names of the problem streams
_SHOWN = 8  # completions kept of each logged step


class Clock:
    """Seconds of each phase of the current step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[f"time/{phase}"] = self.seconds.get(f"time/{phase}", 0.0) + now - since
        return now


@dataclass
class Totals:
    """Over all GRPO steps."""

    tokens_compared: int = 0
    tokens_nonzero: int = 0


@dataclass(frozen=True)
class Prepared:
    source: Source
    judge: Judge
    model: ModelConfig
    plan: Plan


def prepare(config: RunConfig) -> Prepared:
    """All that a run needs before a process starts or a file is written; raises a BAD_INPUT error."""
    source = open_source(config)
    model = model_config(config, len(source.tokenizer))
    longest = max(len(p.prompt_ids) for p in (*source.train, *source.held_out))
    plan = make_plan(config, model, longest)
    if not config.dry_run:
        check_machine(config, plan)
        _check_out_dir(Path(config.out_dir))
    return Prepared(source, judge_of(source, config.reward), model, plan)


def run(config: RunConfig, console: Console) -> dict[str, Any]:
    """The whole run; returns its summary. Raises a BAD_INPUT error before anything is started or written, if it can."""
    start = time.perf_counter()
    if config.dry_run and config.model.hf.get("vocab_size") and not config.model.path:
        model = model_config(config, None)  # a plan needs no data
        print_plan(config, model, make_plan(config, model, prompt_tokens=_prompt_budget(config)), console)
        return {}
    ready = prepare(config)
    source, judge = ready.source, ready.judge
    if config.dry_run:
        print_plan(config, ready.model, ready.plan, console)
        return {}
    values = config.model_dump()
    with (
        _claim(Path(config.out_dir)) as out_dir,
        cluster(config, ready.model) as (rollout, trainer),
        RunLog(out_dir, values, config.logger, out_dir.name) as log,
    ):
        (out_dir / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        rows: list[dict[str, Any]] = []
        completions: list[dict[str, Any]] = []

        def record(step: int, metrics: dict[str, Any]) -> None:
            rows.append({"step": step, **metrics})
            log.step(step, metrics)

        _warm_start(config, source, trainer, record, console)
        _publish(trainer, rollout, 0)
        before = _evaluate(config, source, rollout, console)
        record(config.warmup.steps, {"phase": "grpo", "eval/accuracy": before})

        stream = ProblemStream(source.train, config.seed, _TRAIN)
        totals, after = Totals(), before
        with _progress(console, "GRPO") as bar:
            for step in range(1, config.steps + 1):
                clock = Clock()
                now = time.perf_counter()
                problems = stream.take(config.algorithm.prompts_per_step)
                temperature, size = config.rollout.temperature, config.algorithm.group_size
                requests = requests_for(
                    problems, size, config, source.tokenizer.eos_token_id, "train", step, temperature
                )
                sampled = rollout.generate(requests)
                now = clock.lap("sample", now)
                groups = group(problems, sampled, source, judge, config.algorithm.advantage)
                batch = pack(groups, temperature, config.algorithm.loss_mean, config.rollout.max_new_tokens)
                now = clock.lap("score", now)
                report = trainer.step(batch, "policy", config.trainer.lr)
                now = clock.lap("train", now)
                metrics = {"phase": "grpo", "grpo/step": step, **_describe(groups, batch, report)}
                metrics |= _compare(batch, report, totals)
                try:
                    _align(batch, report, config.align.policy, step)
                except align.AlignmentError:
                    record(config.warmup.steps + step, metrics | clock.seconds)
                    raise
                _publish(trainer, rollout, step)
                clock.lap("publish", now)
                metrics |= clock.seconds
                if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                    metrics["eval/accuracy"] = _evaluate(config, source, rollout, console)
                record(config.warmup.steps + step, metrics)
                if step == config.steps or (step - 1) % 10 == 0:
                    shown = _shown(source, groups, batch, report)
                    completions += [{"step": config.warmup.steps + step, **row} for row in shown]
                    log.completions(config.warmup.steps + step, shown)
                bar(step, config.steps, f"reward {metrics['reward/mean']:.2f}  differing bits {totals.tokens_nonzero}")
        if config.steps:
            after = _evaluate(config, source, rollout, console)
            record(config.warmup.steps + config.steps + 1, {"phase": "grpo", "eval/accuracy": after})
        weights = trainer.save(str(out_dir / "model"))
        source.tokenizer.save_pretrained(out_dir / "model")
        summary = {
            "weights_sha256": weights,
            "eval_accuracy_before": before,
            "eval_accuracy_after": after,
            "tokens_compared": totals.tokens_compared,
            "tokens_nonzero": totals.tokens_nonzero,
            "steps": config.steps,
            "seconds": round(time.perf_counter() - start, 1),
            "device": config.device,
            "versions": _versions(config.device),
        }
        log.finish(summary)
        write_report(out_dir / "report.html", rows, summary, values, completions)
    return summary


def _warm_start(config: RunConfig, source: Source, trainer: TrainerFleet, record: Any, console: Console) -> None:
    """Supervised steps on demonstrations; the learning rate falls linearly from warmup.lr to 0.

    The teacher is as good as the config says: `wrong_frac` of the demonstrations carry the solution of another problem.
    What the verifier teaches afterwards can therefore be more than imitation could.
    """
    section = config.warmup
    stream = ProblemStream(source.train, config.seed, _WARMUP)
    with _progress(console, "warm start") as bar:
        for step in range(section.steps):
            now = time.perf_counter()
            problems = stream.take(section.sequences)
            noise = np.random.Generator(np.random.Philox(key=[config.seed, step]))
            wrong = noise.random(len(problems)) < section.wrong_frac
            shown = [
                p if not w else problems[noise.integers(len(problems))] for p, w in zip(problems, wrong, strict=True)
            ]
            limit = config.rollout.max_new_tokens
            batch = pack_supervised(
                [(p, source.encode_solution(t)[:limit]) for p, t in zip(problems, shown, strict=True)]
            )
            report = trainer.step(batch, "likelihood", section.lr * (1 - step / section.steps))
            metrics = {
                "phase": "warmup",
                "policy/loss": report.loss,
                "policy/grad_norm": report.grad_norm,
                "time/train": time.perf_counter() - now,
            }
            record(step, metrics)
            bar(step + 1, section.steps, f"loss {report.loss:.3f}")
    trainer.reset_optimizer()


def _publish(trainer: TrainerFleet, rollout: RolloutFleet, version: int) -> str:
    """Both sides hold the same digest after this, or the run stops."""
    references, slices = trainer.publish()
    assert digest(slices)
    return rollout.load(version, references, slices)


def _evaluate(config: RunConfig, source: Source, rollout: RolloutFleet, console: Console) -> float:
    """Share of held-out problems answered right (reward 1), one sample each."""
    problems = source.held_out[: config.eval.problems]
    requests = requests_for(problems, 1, config, source.tokenizer.eos_token_id, "eval", 0, config.eval.temperature)
    completions = rollout.generate(requests)
    right = [score(p, [c], source, source.judge)[0].reward >= 1 for p, c in zip(problems, completions, strict=True)]
    accuracy = sum(right) / len(right)
    console.print(
        f"held-out accuracy {accuracy:.3f} ({sum(right)} of {len(right)}, temperature {config.eval.temperature})"
    )
    return accuracy


def _compare(batch: Batch, report: StepReport, totals: Totals) -> dict[str, Any]:
    metrics = divergence(report.logprobs, batch.logprobs, np.repeat(np.arange(batch.sequences), batch.responses))
    totals.tokens_compared += len(batch.logprobs)
    totals.tokens_nonzero += int(metrics["divergence/tokens_nonzero"])
    return metrics


def _align(batch: Batch, report: StepReport, policy: Literal["fail", "warn"], step: int) -> None:
    """The check that costs nothing: the loss needed the trainer's log-probs anyway."""
    sequence = np.repeat(np.arange(batch.sequences), batch.responses)
    rows = batch.response_rows()
    positions = rows - (np.cumsum(batch.lengths) - batch.lengths)[sequence]
    align.check(report.logprobs, batch.logprobs, sequence, positions, batch.token_ids[rows], policy, step)


def _describe(groups: list[Group], batch: Batch, report: StepReport) -> dict[str, Any]:
    rewards = np.array([s.reward for g in groups for s in g.samples])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/solved_frac": float((rewards >= 1).mean()),
        "reward/groups_without_signal_frac": float(np.mean([len({s.reward for s in g.samples}) == 1 for g in groups])),
        "response/length_mean": float(batch.responses.mean()),
        "response/truncated_frac": float(
            np.mean([s.completion.finish_reason == "length" for g in groups for s in g.samples])
        ),
        "policy/entropy": float(-report.logprobs.mean(dtype=np.float64)),  # Monte Carlo: the tokens are its own samples
        "policy/loss": report.loss,
        "policy/grad_norm": report.grad_norm,
        "policy/clip_fraction": report.clip_fraction,
    }


def _shown(source: Source, groups: list[Group], batch: Batch, report: StepReport) -> list[dict[str, Any]]:
    """The first sample of the first groups, with both sides' log-probs of each token."""
    ends = np.cumsum(batch.responses)
    size = len(groups[0].samples)
    out = []
    for i, g in enumerate(groups[:_SHOWN]):
        sample = g.samples[0]
        rows = slice(ends[i * size] - batch.responses[i * size], ends[i * size])
        out.append(
            {
                "prompt": g.problem.prompt,
                "completion": sample.text,
                "answer": g.problem.answer,
                "reward": sample.reward,
                "tokens": list(sample.completion.token_ids),
                "token_texts": [str(source.tokenizer.decode([t])) for t in sample.completion.token_ids],
                "logprobs": [float(x) for x in batch.logprobs[rows]],
                "trainer_logprobs": [float(x) for x in report.logprobs[rows]],
            }
        )
    return out


def _check_out_dir(out_dir: Path) -> None:
    """UserError where it cannot become a folder of this run's own."""
    try:
        if (out_dir / "config.yaml").exists():
            raise UserError(f"out_dir={out_dir} holds a run already: choose another or remove it")
        nearest = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    except OSError as error:
        raise UserError(f"out_dir={out_dir} cannot be read: {error.strerror}") from None
    if not nearest.is_dir():
        raise UserError(f"out_dir={out_dir} cannot be made: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"out_dir={out_dir} cannot be made: {nearest} is not writable")


@contextlib.contextmanager
def _claim(out_dir: Path) -> Iterator[Path]:
    """Makes the folder, and removes it where the run ended before it wrote anything."""
    _check_out_dir(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out_dir={out_dir} cannot be made: {error.strerror}") from None
    try:
        yield out_dir
    finally:
        with contextlib.suppress(OSError):
            out_dir.rmdir()  # does nothing to a folder that holds something


def _prompt_budget(config: RunConfig) -> int:
    return getattr(config.data, "max_prompt_tokens", 64)


def _versions(device: str) -> dict[str, str]:
    packages = ["samebit", "torch", "ray", "transformers", "numpy"]
    packages += ["triton"] if device == "cuda" else []
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):  # samebit itself, run from a folder that is not installed
            found[name] = version(name)
    return found


class _progress:
    """A bar on a terminal; elsewhere a line now and then. Called with (done, total, what to show)."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> "_progress":
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.name, note="")
        return self

    def __call__(self, done: int, total: int, note: str) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, total=total, note=note)
        elif done == total or done % max(1, total // 10) == 0:
            self.console.print(f"{self.name} {done}/{total}  {note}")
            sys.stdout.flush()

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()
