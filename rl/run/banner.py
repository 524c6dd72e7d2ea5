"""Says what a run is, before it begins."""

import os
from collections.abc import Mapping
from types import MappingProxyType

import torch

from kernels.model import ModelConfig
from kernels.model.formats import PLAIN
from kernels.packages import version_of
from kernels.weights.beside import name_of
from rl.config import RunConfig
from rl.data import Source, left_out
from rl.data.section import AnyData, DatasetSection, MixtureSection, ReasoningGymSection
from rl.evaluation.sets import EvaluationSet
from rl.hosted.asked import elsewhere
from rl.plan import Plan, gib


def banner(
    config: RunConfig,
    model: ModelConfig,
    source: Source,
    reward: str,
    plan: Plan,
    sets: Mapping[str, EvaluationSet] = MappingProxyType({}),
) -> list[str]:
    """Says in one line each: the run, model, data, further sets, steps, layout, device and folder. `reward`: what judges."""
    section, data, algorithm = config.model, config.data, config.algorithm
    path, others = _named(data), elsewhere(config)
    format = "" if model.format == PLAIN else f" and {model.format}"
    rows = {
        f"samebit {version_of('samebit') or ''}": f"{config.numerics} numerics, seed {config.seed}",
        "model": f"{section.path or 'random weights'}: {plan.parameters:,} parameters, {model.layers} layers x "
        f"{model.hidden_size}, vocabulary {model.vocab_size:,}, {name_of(config.dtype)}{format}, {model.leaves} leaves",
        "data": f"{path}: {len(source.train):,} problems to train on, {len(source.held_out):,} held out{left_out(source)}; "
        f"judged by {reward}{''.join(f'; {line}' for line in source.about)}",
        "sets": "; ".join(set_line(name, one, config.eval.problems) for name, one in sets.items()),
        **({"environment": _environment(config)} if config.environment.name != "single_turn" else {}),
        "algorithm": f"{algorithm.name}, {algorithm.loss_mean} mean, clip {algorithm.clip_low:g} / {algorithm.clip_high:g}, "
        f"{algorithm.mini_batches * algorithm.update_epochs} update(s) a step",
        "elsewhere": f"{', '.join(others)}: by another program, with the same bits on the same machine and versions alone",
        "steps": f"{config.warmup.steps} supervised, {config.steps} GRPO of {algorithm.prompts_per_step} prompts x "
        f"{algorithm.group_size}; {min(config.eval.problems, len(source.held_out))} problems an evaluation",
        "layout": f"{config.rollout.replicas} rollout engine(s) x tp {config.rollout.tp}, {config.trainer.world_size} trainer "
        f"rank(s), {config.cluster.placement}; {gib(plan.rollout_bytes)} and {gib(plan.trainer_bytes)} a process",
        "device": _device(config.device),
        "out_dir": f"{config.out_dir}: train.log, metrics.jsonl, and report.html at the end",
    }
    if not sets:
        del rows["sets"]
    if not others:
        del rows["elsewhere"]
    return [f"{name:<{len('samebit 0.0.0')}}  {text}" for name, text in rows.items()]


def set_line(name: str, one: EvaluationSet, problems: int) -> str:
    """Says of a set of `eval.sets` how many problems are evaluated, how often, and by what. `problems`: at most."""
    count, there = min(problems, len(one.problems)), len(one.problems)
    return f"{name}: {count:,} of {there:,} problems, {one.samples} sample(s) each, judged by {one.reward.name}"


def _device(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"cpu, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def _environment(config: RunConfig) -> str:
    section = config.environment
    return f"{section.factory}, up to {section.max_turns} turns and {section.max_tokens:,} tokens"


def _named(data: AnyData) -> str:
    if isinstance(data, MixtureSection):
        return f"a mixture of {', '.join(sorted(data.sources))}"
    if isinstance(data, ReasoningGymSection):
        return data.task
    return data.path if isinstance(data, DatasetSection) else f"{data.problems:,} numbers"
