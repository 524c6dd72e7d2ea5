"""The warm start: supervised steps before GRPO."""

import time
from dataclasses import replace
from typing import Any

from rl.checkpoints import Checkpoints, Progress
from rl.cluster import TrainerFleet
from rl.config import RunConfig
from rl.data import WARMUP, ProblemStream, Source
from rl.data.draws import Draws
from rl.pack import pack_supervised
from rl.run.screen import Bar, Screen


def warm_start(
    config: RunConfig,
    source: Source,
    trainer: TrainerFleet,
    state: Progress,
    checkpoints: Checkpoints,
    record: Any,
    console: Screen,
) -> Progress:
    """Supervised steps on demonstrations, those that `state` has not done; the learning rate falls linearly from warmup.lr
    to 0. What they end with is on the disk before GRPO begins.

    The teacher is as good as the config says: `wrong_frac` of the demonstrations carry the solution of another problem.
    What the verifier teaches afterwards can therefore be more than imitation could.
    """
    section = config.warmup
    if state.supervised == section.steps:
        return state
    stream = ProblemStream(source.train, config.seed, WARMUP)
    stream.cursor = state.warmup_cursor
    with Bar(console, "warm start") as bar:
        for step in range(state.supervised, section.steps):
            now = time.perf_counter()
            problems = stream.take(section.sequences)
            noise = Draws(config.seed, step)
            wrong = [noise.fraction() < section.wrong_frac for _ in problems]
            shown = [problems[noise.below(len(problems))] if w else p for p, w in zip(problems, wrong, strict=True)]
            limit = config.rollout.max_new_tokens
            batch = pack_supervised(
                [(p, source.encode_solution(t)[:limit]) for p, t in zip(problems, shown, strict=True)]
            )
            with bar.phase("training"):
                report = trainer.step(batch, "likelihood", section.lr * (1 - step / section.steps))
            metrics: dict[str, Any] = {
                "phase": "warmup",
                "policy/loss": report.loss,
                "policy/grad_norm": report.grad_norm,
                "time/train": time.perf_counter() - now,
            }
            record(step, metrics)
            bar(
                step + 1,
                section.steps,
                f"loss {report.loss:.3f}  {len(batch.token_ids) / metrics['time/train']:,.0f} tokens/s",
            )
            state = replace(state, supervised=step + 1, warmup_cursor=stream.cursor)
            checkpoints.settle()
            if step + 1 < section.steps and checkpoints.due(step + 1, section.steps):
                checkpoints.save(state, trainer.digest())
    trainer.reset_optimizer()
    if checkpoints.due(section.steps, section.steps):
        checkpoints.save(state, trainer.digest())
        checkpoints.settle(wait=True)
    return state
