"""A small engine and a small trainer in this process, and whole steps of both."""

import contextlib
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from kernels.weights.initial import initial
from rl.algorithms import open_algorithm
from rl.compose import check
from rl.config import RunConfig
from rl.data import TRAIN, Problem, ProblemStream, Source, open_source
from rl.environments.single_turn import SingleTurn
from rl.journal import Journal, Totals
from rl.model import model_config
from rl.prove import SMALL
from rl.requests import requests_for, train_sampling
from rl.rewards.reward import Part, Reward, WeightedSum
from rl.schedule import Schedule
from rl.step import Step
from rollout.engine import Engine, EngineConfig
from tests.bits import sha256
from trainer.batch import Batch
from trainer.optimizer import AdamWConfig
from trainer.trainer import Trainer, TrainerConfig

STEPS = 3
Row = dict[str, Any]


@cache
def made(*keys: str) -> tuple[RunConfig, Source]:
    (config,) = check([*SMALL, "seed=3", *keys])
    return config, open_source(config)


def begins(problem: Problem, text: str) -> float:
    """A reward that an untrained model earns at times, and in some groups never."""
    return float(text.startswith(("1", "2")))


class Fleet:
    """A trainer that answers as the fleet does, which has all ranks' rows."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.step, self.remember = trainer.step, trainer.remember

    def frozen_logprobs(self, batch: Batch) -> np.ndarray:
        return self.trainer.frozen_logprobs(batch).values

    def logprobs(self, batch: Batch) -> np.ndarray:
        return self.trainer.forward(batch).values

    def past_logprobs(self, batch: Batch) -> np.ndarray:
        return self.trainer.past_logprobs(batch).values


class Run:
    """The parts of a run, from weights that another one may have left."""

    def __init__(self, mesh: DeviceMesh, keys: tuple[str, ...], micro_leaves: int, left: "Run | None" = None) -> None:
        config, source = made(*keys)
        self.model = model_config(config, len(source.tokenizer))
        section, serving, algorithm = config.trainer, config.rollout, config.algorithm
        adamw = AdamWConfig(section.betas, section.eps, section.weight_decay, section.grad_clip)
        how = TrainerConfig(section.leaf_sequences, micro_leaves, adamw, dtype=torch.float32)
        self.trainer = Trainer(self.model, how, mesh, left.trainer.weights() if left else initial(self.model, 3))
        self.stream = ProblemStream(source.train, config.seed, TRAIN)
        if algorithm.frozen:
            self.trainer.freeze(self.model, initial(self.model, 3))
        self.fleet: Any = Fleet(self.trainer)  # without a critic
        if left:
            self.stream.cursor, self.trainer.optimizer.steps = left.stream.cursor, left.trainer.optimizer.steps
            for mine, theirs in zip(
                self.trainer.optimizer.all_moments(), left.trainer.optimizer.all_moments(), strict=True
            ):
                mine.copy_(theirs)
        self.engine = Engine(
            self.model, EngineConfig(serving.pages, serving.page_size, True, serving.limits, torch.float32)
        )
        sampling = train_sampling(serving, source.tokenizer.ends)
        log: Any = SimpleNamespace(worst=None, step=lambda *row: None, completions=lambda number, rows: list(rows))
        cards: Any = SimpleNamespace(to_rollout=lambda: None, to_trainer=lambda weights_stay: None)
        self.step = Step(
            stream=self.stream,
            requests_for=lambda problems, step, first: requests_for(
                problems, algorithm.group_size, sampling, config.seed, "train", step, first
            ),
            environment=SingleTurn(
                source.tokenizer, Reward("begins", WeightedSum([Part("begins", 1.0, begins)]), of_user=True)
            ),
            algorithm=open_algorithm(algorithm, serving.max_new_tokens),
            rollout=self.engine,
            trainer=self.fleet,
            cards=cards,
            journal=Journal(log, source.tokenizer, "exact", 0, Totals()),
            publish=self.publish,
            phase=lambda what: contextlib.nullcontext(),
            prompts=algorithm.prompts_per_step,
            rounds=algorithm.sampling_rounds,
            mini_batches=algorithm.mini_batches,
            epochs=algorithm.update_epochs,
            reference=self.fleet.frozen_logprobs if algorithm.frozen else None,
            lr=Schedule(section.lr, section.lr_schedule, section.lr_warmup_steps, STEPS),
            policy="fail",
        )

    def publish(self, version: int) -> None:
        self.engine.load(self.trainer.weights(), version)

    def steps(self, first: int, last: int) -> list[Row]:
        self.step.publish(first - 1)
        return [self.step(step, show=False)[0] for step in range(first, last + 1)]

    def digest(self) -> str:
        return sha256(weight for _, weight in self.trainer.weights())


def plain(metrics: Row) -> Row:
    """Without what depends on the machine, or is a float64 sum over a batch in whatever order."""
    left_out = ("time/", "memory/")
    return {k: v for k, v in metrics.items() if not k.startswith(left_out) and k not in ("policy/loss",)}
