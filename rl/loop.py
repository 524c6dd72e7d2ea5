"""The run: warm start, evaluation, GRPO steps, evaluation, checkpoints between them, and what it leaves behind."""

import contextlib
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from kernels.collectives.bucket import remove_leftovers
from kernels.model import ModelConfig
from kernels.model.ahead import Serving
from kernels.model.ahead import prepare as prepare_kernels
from rl import align
from rl.checkpoints import Checkpoints, beside_files
from rl.cluster import RolloutFleet, TrainerFleet, cluster
from rl.config import RunConfig
from rl.data import TRAIN, ProblemStream, Source, open_source
from rl.errors import RunError
from rl.evaluate import evaluate
from rl.handover import Handover
from rl.identity import identity
from rl.memory import advised
from rl.metrics import divergence, profile, worst
from rl.model import beside, model_config, remarks
from rl.out_dir import check_out_dir, claim
from rl.pack import pack
from rl.plan import Plan, check_machine, make_plan, print_plan
from rl.publish import publish
from rl.report import reported
from rl.requests import requests_for, train_sampling
from rl.resume import check_model, find_start, logged, prepare_logs
from rl.rewards.golds import check_golds
from rl.rewards.reward import Reward, open_reward
from rl.run.banner import banner
from rl.run.files import write_atomic
from rl.run.log import RunLog
from rl.run.screen import Bar, Screen, Waiting
from rl.score import Group, group
from rl.speed import speeds
from rl.warm_start import warm_start
from trainer.batch import Batch, StepReport

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
    reward: Reward
    model: ModelConfig
    plan: Plan
    identity: dict[str, Any]
    warnings: tuple[str, ...]  # one line each


def prepare(config: RunConfig, console: Console | None = None) -> Prepared:
    """All that a run needs before a process of it starts or a file is written; says on `console` what takes long. Raises a
    BAD_INPUT error."""
    source = open_source(config, console)
    model = model_config(config, len(source.tokenizer))
    longest = max(len(p.prompt_ids) for p in (*source.train, *source.held_out))
    plan = make_plan(config, model, longest)
    if not config.dry_run:
        check_machine(config, plan)
        check_out_dir(Path(config.out_dir))
    mine = identity(config, source)
    if not config.dry_run:
        check_model(find_start(config, mine, thorough=False), model)
    reward = open_reward(config.reward, source)
    with Waiting(console, f"judging the gold solutions by {reward.name}"):
        golds = check_golds(source, reward, by_tokens=config.model.path is not None)
    return Prepared(source, reward, model, plan, mine, tuple(filter(None, (*source.warnings, golds))))


def run(config: RunConfig, console: Screen) -> dict[str, Any]:
    """The whole run; returns its summary. Raises a BAD_INPUT error before anything is started or written, if it can."""
    start = time.perf_counter()
    if config.dry_run and config.model.hf.get("vocab_size") and not config.model.path:
        model = model_config(config, None)  # a plan needs no data
        print_plan(config, model, make_plan(config, model, prompt_tokens=_prompt_budget(config)), console)
        return {}
    ready = prepare(config, console)
    source, reward = ready.source, ready.reward
    for line in (*remarks(config, ready.model), *ready.warnings):
        console.warn(line)
    if config.dry_run:
        print_plan(config, ready.model, ready.plan, console, source)
        return {}
    for line in banner(config, ready.model, source, reward.name, ready.plan):
        console.print(line)
    values = config.model_dump(mode="json")
    with contextlib.ExitStack() as stack:
        stack.enter_context(advised(config, ready.plan))
        out_dir = stack.enter_context(claim(Path(config.out_dir)))
        with Waiting(console, "reading the checkpoint"):
            begin = find_start(config, ready.identity, thorough=True)  # nobody else writes there now
        for reason in begin.refused:
            print(f"samebit: checkpoint refused: {reason}", file=sys.stderr)
            console.note(f"checkpoint refused: {reason}")
        logged(begin, out_dir)  # says what is missing of them
        for path, size in remove_leftovers():
            console.print(
                f"removed {path} ({size / 2**20:,.1f} MiB of memory), which a run that was killed left behind"
            )
        if config.device == "cuda":
            _compile(config, ready.model, console)
        with Waiting(console, f"starting {ready.plan.rollout_processes + ready.plan.trainer_processes} processes"):
            rollout, trainer = stack.enter_context(cluster(config, ready.model, begin.checkpoint))
        write_atomic(out_dir / "config.yaml", yaml.safe_dump(values, sort_keys=False))
        cards = Handover(rollout, trainer, config.cluster.placement == "colocated")
        positions = prepare_logs(begin, out_dir)
        stack.enter_context(console.keep(out_dir / "train.log"))
        stack.enter_context(reported(out_dir))
        log = stack.enter_context(RunLog(out_dir, values, config.logger, out_dir.name, positions))
        console.print(f"{'wandb':<13}  {log.wandb_at or 'none'}")
        state = begin.progress
        if begin.checkpoint:
            if trainer.digest() != begin.checkpoint.weights_sha256:
                raise RunError(f"{begin.checkpoint.folder} was restored, and its weights have another digest")
            console.print(f"resumed {begin.checkpoint.folder}")
        elif begin.continues:
            console.print("no checkpoint yet: the run starts again")
        start -= state.seconds
        facts = {"identity": ready.identity, "config": values, "versions": _versions(config.device)}
        saved = beside(config, ready.model, source.tokenizer)
        files = beside_files(saved, ready.model) if config.checkpoint.every else {}
        checkpoints = Checkpoints(out_dir, config.checkpoint, trainer, ready.model, log, start, files, facts)

        contrast = config.numerics != "exact"
        if contrast:
            console.print(f"numerics={config.numerics}: a contrast run, of which nothing is promised")

        def record(step: int, metrics: dict[str, Any]) -> None:
            metrics |= {"numerics": config.numerics} if contrast else {}
            log.step(step, metrics)

        state = warm_start(config, source, trainer, state, checkpoints, record, console)
        _publish(trainer, rollout, state.step, console)
        if not state.accuracy:
            first = evaluate(config, source, reward, rollout, cards, console)
            state = replace(state, accuracy=(first.accuracy,))
            record(config.warmup.steps, {"phase": "grpo", **first.metrics()})
        (before,) = state.accuracy
        checkpoints.settle()

        stream = ProblemStream(source.train, config.seed, TRAIN)
        stream.cursor = state.cursor
        totals, after, peak = Totals(state.tokens_compared, state.tokens_nonzero), before, 0
        sampling = train_sampling(config, source.tokenizer.ends)
        with Bar(console, "GRPO") as bar:
            for step in range(state.step + 1, config.steps + 1):
                clock = Clock()
                now = time.perf_counter()
                problems = stream.take(config.algorithm.prompts_per_step)
                requests = requests_for(problems, config.algorithm.group_size, sampling, config.seed, "train", step)
                cards.to_rollout()
                now = clock.lap("handover", now)
                with bar.phase("sampling"):
                    sampled = rollout.generate(requests)
                now = clock.lap("sample", now)
                with bar.phase("scoring"):
                    groups = group(problems, sampled, source, reward, config.algorithm.advantage)
                batch = pack(groups, sampling, config.algorithm.loss_mean, config.rollout.max_new_tokens)
                now = clock.lap("score", now)
                cards.to_trainer(weights_stay=False)
                now = clock.lap("handover", now)
                with bar.phase("training"):
                    report = trainer.step(batch, "policy", config.trainer.lr)
                now = clock.lap("train", now)
                metrics = {"phase": "grpo", "grpo/step": step, **_describe(groups, batch, report)}
                metrics |= _compare(batch, report, totals)
                peak = max(peak, report.peak_bytes)
                every = step == config.steps or (step - 1) % 10 == 0
                log.completions(config.warmup.steps + step, _shown(source, groups, batch, report, every, log))
                try:
                    metrics |= _align(batch, report, "record" if contrast else config.align.policy, step)
                except align.AlignmentError:
                    record(config.warmup.steps + step, metrics | clock.seconds)
                    raise
                _publish(trainer, rollout, step, console)
                checkpoints.settle()
                clock.lap("publish", now)
                metrics |= clock.seconds | speeds(
                    ready.model, batch, clock.seconds, config.trainer.world_size, config.device == "cuda"
                )
                if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                    last = evaluate(config, source, reward, rollout, cards, console)
                    metrics |= last.metrics()
                    after = last.accuracy
                record(config.warmup.steps + step, metrics)
                if checkpoints.due(step, config.steps):
                    state = replace(
                        state,
                        step=step,
                        cursor=stream.cursor,
                        tokens_compared=totals.tokens_compared,
                        tokens_nonzero=totals.tokens_nonzero,
                    )
                    cards.to_trainer(weights_stay=True)
                    checkpoints.save(state, trainer.digest())
                bar(step, config.steps, _told(metrics, after))
        if config.steps:
            last = evaluate(config, source, reward, rollout, cards, console)
            record(config.warmup.steps + config.steps + 1, {"phase": "grpo", **last.metrics()})
            after = last.accuracy
        with Waiting(console, "saving the last checkpoint and the model"):
            checkpoints.settle(wait=True)
            cards.to_trainer(weights_stay=False)
            weights = trainer.save(str(out_dir / "model") if config.save_model else "", saved)
        summary = {
            "weights_sha256": weights,
            "eval_accuracy_before": before,
            "eval_accuracy_after": after,
            "judged_by": reward.name,
            "tokens_compared": totals.tokens_compared,
            "tokens_nonzero": totals.tokens_nonzero,
            "steps": config.steps,
            "seconds": round(time.perf_counter() - start, 1),
            "memory": {
                "trainer_peak_gib": round(peak / 2**30, 3),  # the fullest rank, in the steps above
                "trainer_planned_gib": round(ready.plan.trainer_bytes / 2**30, 3),
                "rollout_peak_gib": round(rollout.peak_bytes() / 2**30, 3),
                "rollout_planned_gib": round(ready.plan.rollout_bytes / 2**30, 3),
            },
            "device": config.device,
            "numerics": config.numerics,
            "versions": _versions(config.device),
        }
        log.finish(summary)
    return summary


def _publish(trainer: TrainerFleet, rollout: RolloutFleet, version: int, console: Console) -> None:
    """Both sides hold the same bits after this, or the run stops."""
    what = f"publishing the weights of version {version}"
    with Waiting(console, f"{what}, by buckets") as waiting:

        def progress(done: int, of: int) -> None:
            waiting.done, waiting.total = done, of
            if done == of:
                waiting.what = f"{what}: all buckets are there, comparing what was sent and received"

        publish(trainer, rollout, version, progress)


def _compare(batch: Batch, report: StepReport, totals: Totals) -> dict[str, Any]:
    sequence = np.repeat(np.arange(batch.sequences), batch.responses)
    metrics: dict[str, Any] = dict(divergence(report.logprobs, batch.logprobs, sequence))
    place = np.arange(len(sequence)) - (np.cumsum(batch.responses) - batch.responses)[sequence]
    metrics |= profile(report.logprobs, batch.logprobs, place)
    totals.tokens_compared += len(batch.logprobs)
    totals.tokens_nonzero += int(metrics["divergence/tokens_nonzero"])
    return metrics


def _align(batch: Batch, report: StepReport, policy: align.Policy, step: int) -> dict[str, Any]:
    """The check that costs nothing: the loss needed the trainer's log-probs anyway. Where it goes on: the first mismatch."""
    sequence = np.repeat(np.arange(batch.sequences), batch.responses)
    rows = batch.response_rows()
    positions = rows - (np.cumsum(batch.lengths) - batch.lengths)[sequence]
    first = align.check(report.logprobs, batch.logprobs, sequence, positions, batch.token_ids[rows], policy, step)
    return {"divergence/first_mismatch": asdict(first)} if first else {}


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
        "memory/trainer_peak_gib": report.peak_bytes / 2**30,
        "memory/trainer_host_peak_gib": report.host_peak_bytes / 2**30,
    }


def _told(metrics: dict[str, Any], accuracy: float) -> str:
    """What the console says of a step; `accuracy`: of the last evaluation."""
    differing = int(metrics["divergence/tokens_nonzero"])
    gap = f"{metrics['divergence/logprob_abs_diff_max']:.2g} ({differing:,} tokens differ)" if differing else "0"
    return (
        f"reward {metrics['reward/mean']:.3f}  accuracy {accuracy:.3f}  {metrics['speed/step_tokens_per_s']:,.0f} tokens/s  "
        f"gap {gap}"
    )


def _shown(
    source: Source, groups: list[Group], batch: Batch, report: StepReport, every: bool, log: RunLog
) -> list[dict[str, Any]]:
    """The completions of a step to keep, with both sides' log-probs of each token: one that is worse than all before it, and
    with `every` the first sample of the first groups."""
    size, ends = len(groups[0].samples), np.cumsum(batch.responses)
    chosen = list(range(0, len(groups) * size, size))[:_SHOWN] if every else []
    badness, token = worst(report.logprobs, batch.logprobs)
    if log.worst is None or badness > log.worst:
        chosen = list(dict.fromkeys([*chosen, int(np.searchsorted(ends, token, side="right"))]))
    out = []
    for i in chosen:
        group, sample = groups[i // size], groups[i // size].samples[i % size]
        rows = slice(ends[i] - batch.responses[i], ends[i])
        out.append(
            {
                "prompt": group.problem.prompt,
                "completion": sample.text,
                "answer": group.problem.answer,
                "reward": sample.reward,
                "tokens": list(sample.completion.token_ids),
                "token_texts": [source.tokenizer.decode([t], special=True) for t in sample.completion.token_ids],
                "logprobs": [float(x) for x in batch.logprobs[rows]],
                "trainer_logprobs": [float(x) for x in report.logprobs[rows]],
            }
        )
    return out


def _prompt_budget(config: RunConfig) -> int:
    return getattr(config.data, "max_prompt_tokens", 64)


def _compile(config: RunConfig, model: ModelConfig, console: Console) -> None:
    section = config.rollout
    serving = Serving(section.tp, section.page_size, section.max_running, model.max_positions)
    prepare_kernels(model, config.dtype, serving, True, console.print)


def _versions(device: str) -> dict[str, str]:
    packages = ["samebit", "torch", "ray", "transformers", "numpy"]
    packages += ["triton"] if device == "cuda" else []
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):  # samebit itself, run from a folder that is not installed
            found[name] = version(name)
    return found
