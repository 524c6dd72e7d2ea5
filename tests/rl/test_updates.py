"""Whole steps of a small engine and a small trainer in this process: further rounds of sampling, several updates on a batch, a
learning rate that falls. One digest, however the trainer cuts its batches and wherever the run was stopped."""

import contextlib
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

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

UPDATES = ("algorithm.mini_batches=2", "algorithm.update_epochs=2")
KEYS = (
    *UPDATES,
    "algorithm.sampling_rounds=3",
    "trainer.lr_schedule=cosine",
    "trainer.lr_warmup_steps=1",
    "trainer.lr=1e-3",
)
STEPS = 3
Row = dict[str, Any]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@cache
def made(*keys: str) -> tuple[RunConfig, Source]:
    (config,) = check([*SMALL, "seed=3", *keys])
    return config, open_source(config)


def begins(problem: Problem, text: str) -> float:
    """A reward that an untrained model earns at times, and in some groups never."""
    return float(text.startswith(("1", "2")))


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
        self.trainer.frozen_logprobs = self._asked  # type: ignore[method-assign,assign]
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
            trainer=self.trainer,
            cards=cards,
            journal=Journal(log, source.tokenizer, "exact", 0, Totals()),
            publish=lambda version: self.engine.load(self.trainer.weights(), version),
            phase=lambda what: contextlib.nullcontext(),
            prompts=algorithm.prompts_per_step,
            rounds=algorithm.sampling_rounds,
            mini_batches=algorithm.mini_batches,
            epochs=algorithm.update_epochs,
            frozen=algorithm.frozen is not None,
            lr=Schedule(section.lr, section.lr_schedule, section.lr_warmup_steps, STEPS),
            policy="fail",
        )

    def _asked(self, batch: Batch) -> np.ndarray:
        """As the fleet answers, which has all ranks' rows."""
        return Trainer.frozen_logprobs(self.trainer, batch).values

    def steps(self, first: int, last: int) -> list[Row]:
        self.step.publish(first - 1)
        return [self.step(step, show=False)[0] for step in range(first, last + 1)]

    def digest(self) -> str:
        return sha256(weight for _, weight in self.trainer.weights())


@pytest.mark.parametrize(
    "keys",
    [
        ("algorithm=grpo", "algorithm.kl_in=loss", "algorithm.kl_estimator=k3"),
        ("algorithm=reinforce_plus_plus", "algorithm.kl_in=reward", "algorithm.kl_estimator=k1"),
    ],
    ids=["loss", "reward"],
)
def test_one_digest_with_a_reference(keys: tuple[str, ...], mesh: DeviceMesh) -> None:
    """The reference is the weights that RL began with, also where the run goes on."""
    keys = (*keys, "algorithm.kl_coef=0.5", *UPDATES, "trainer.lr=1e-2")
    whole = Run(mesh, keys, micro_leaves=1)
    told = whole.steps(1, STEPS)
    assert told[0]["policy/kl_ref"] == 0 and told[0]["policy/kl_ref_k1"] == 0, "the policy is the reference at first"
    assert all(metrics["policy/kl_ref"] > 0 and metrics["time/reference"] > 0 for metrics in told[1:])
    cut = Run(mesh, keys, micro_leaves=4)
    before = cut.steps(1, 1)
    rest = Run(mesh, keys, micro_leaves=2, left=cut)
    assert [plain(m) for m in before + rest.steps(2, STEPS)] == [plain(m) for m in told]
    assert rest.digest() == whole.digest()
    free = Run(mesh, (*keys, "algorithm.kl_coef=0"), micro_leaves=1)
    assert "policy/kl_ref" not in free.steps(1, STEPS)[0] and free.digest() != whole.digest()


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_one_digest(name: str, mesh: DeviceMesh) -> None:
    keys = (f"algorithm={name}", *KEYS)
    whole = Run(mesh, keys, micro_leaves=1)
    told = whole.steps(1, STEPS)
    for metrics in told:
        assert metrics["divergence/tokens_nonzero"] == 0 and metrics["divergence/tokens_compared"] > 0
        assert (metrics["policy/updates"], metrics["policy/updates_on_policy"]) == (4, 1)
        assert metrics["off_policy/ratio_min"] < 1 < metrics["off_policy/ratio_max"]
    assert any(metrics["sampling/groups_dropped"] for metrics in told), "every group had a signal"
    assert whole.stream.cursor == sum(8 + metrics["sampling/groups_dropped"] for metrics in told)
    assert [metrics["policy/lr"] for metrics in told] == pytest.approx([1e-3, 1e-3, 5e-4], rel=1e-6)

    cut = Run(mesh, keys, micro_leaves=4)
    before = cut.steps(1, 1)
    rest = Run(mesh, keys, micro_leaves=2, left=cut)
    assert [plain(m) for m in before + rest.steps(2, STEPS)] == [plain(m) for m in told]
    assert rest.digest() == whole.digest()


def plain(metrics: Row) -> Row:
    """Without what depends on the machine, or is a float64 sum over a batch in whatever order."""
    left_out = ("time/", "memory/")
    return {k: v for k, v in metrics.items() if not k.startswith(left_out) and k not in ("policy/loss",)}
