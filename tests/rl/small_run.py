"""A whole small run in one process, without Ray, and the digests of what it went through, as one line of JSON.

Random weights, a warm start whose gradients are clipped at every step, then two updates on each batch, so that the ratio of
the second is not 1: python -m tests.rl.small_run float32
`test_vector_paths.py` starts it on one path of torch's vector libraries after another. With a second argument, "drafts", the
rollout checks drafted tokens in most steps.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kernels.model import ModelConfig, Parameter
from kernels.ops import rope_table
from kernels.tree import WHOLE
from kernels.weights.digest import Leaves, digest, slice_digests
from kernels.weights.initial import initial
from rl.algorithms import open_algorithm
from rl.checkpoints import Progress
from rl.compose import check
from rl.config import RunConfig
from rl.data import TRAIN, ProblemStream, Source, open_source
from rl.environments.environment import score
from rl.environments.single_turn import SingleTurn
from rl.model import model_config
from rl.prove import SMALL
from rl.requests import requests_for, train_sampling
from rl.rewards.reward import Part, Reward, WeightedSum
from rl.run.screen import Screen
from rl.warm_start import Demonstrations, warm_start
from rollout.drafts.lookup import Lookup
from rollout.engine import Engine, EngineConfig
from tests.bits import sha256
from tests.rollout.liars import speculate
from trainer.optimizer import AdamWConfig
from trainer.trainer import Trainer, TrainerConfig

OWN = "torch's own square roots"  # no stage of the run, which must not depend on them
SQUARES = torch.arange(2500, 7500) / 2500
OVERRIDES = (*SMALL, "seed=3", "steps=4", "warmup.steps=30", "trainer.grad_clip=0.01")


def main(dtype: str, drafts: str = "") -> None:
    (config,) = check([*OVERRIDES, f"model.dtype={dtype}"])
    source = open_source(config)
    model = model_config(config, len(source.tokenizer))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        print(json.dumps(dict(stages(config, source, model, drafts == "drafts"))))
    finally:
        dist.destroy_process_group()


def stages(config: RunConfig, source: Source, model: ModelConfig, drafts: bool) -> Iterable[tuple[str, str]]:
    """(what, SHA-256) of one stage after another."""
    yield OWN, sha256([SQUARES.sqrt()])
    yield "roundings", roundings()
    yield "angles of a long context", sha256(rope_table(40000, 128, 1e6)[0][::7])
    yield "initial weights", of_weights(model, initial(model, config.seed))
    section = config.trainer
    optimizer = AdamWConfig(section.betas, section.eps, section.weight_decay, section.grad_clip)
    how = TrainerConfig(section.leaf_sequences, section.micro_leaves, optimizer, dtype=config.dtype)
    trainer = Trainer(model, how, init_device_mesh("cpu", (1,)), initial(model, config.seed))
    supervised(config, source, trainer)
    yield "weights after the warm start", of_weights(model, trainer.weights())

    serving = config.rollout
    shape = serving.pages, serving.page_size, serving.prefix_cache, serving.limits
    engine = Engine(model, EngineConfig(*shape, config.dtype, speculate="auto" if drafts else "off"))
    if drafts:
        speculate(engine, Lookup())
    stream, sampling = (
        ProblemStream(source.train, config.seed, TRAIN),
        train_sampling(config.rollout, source.tokenizer.ends),
    )
    environment = SingleTurn(
        source.tokenizer, Reward("length", WeightedSum([Part("length", 1.0, by_length)]), of_user=True)
    )
    algorithm = open_algorithm(config.algorithm, config.rollout.max_new_tokens)
    sampled = hashlib.sha256()
    for step in range(1, config.steps + 1):
        engine.load(trainer.weights(), step)
        problems = stream.take(config.algorithm.prompts_per_step)
        asked = requests_for(problems, config.algorithm.group_size, sampling, config.seed, "train", step)
        groups = score(problems, environment.play(asked, engine.generate), environment)
        batch = algorithm.batch(groups)
        sampled.update(batch.token_ids.tobytes() + batch.logprobs.tobytes())
        first = trainer.step(batch, algorithm.loss, section.lr * 10)
        assert np.array_equal(first.logprobs.view("u4"), batch.logprobs.view("u4")), "sampler and trainer disagree"
        again = trainer.step(batch, algorithm.loss, section.lr * 10)
        assert not np.array_equal(again.logprobs, batch.logprobs) and again.grad_norm > section.grad_clip
    assert not drafts or 0 < engine.drafts.accepted < engine.drafts.drafted
    yield "tokens and log-probs", sampled.hexdigest()
    yield "trained weights", of_weights(model, trainer.weights())


def supervised(config: RunConfig, source: Source, trainer: Trainer) -> None:
    fleet = SimpleNamespace(step=trainer.step, reset_optimizer=trainer.optimizer.reset)
    none = SimpleNamespace(settle=lambda wait=False: None, due=lambda step, last: False)
    clipped: list[bool] = []

    def record(step: int, metrics: dict) -> None:
        clipped.append(metrics["policy/grad_norm"] > config.trainer.grad_clip)

    shown = Demonstrations(config.warmup, source, config.seed, config.rollout.max_new_tokens, 0)
    warm_start(config.warmup, shown, fleet, Progress(), none, record, Screen(quiet=True))
    assert all(clipped), "a step whose gradient is not clipped takes no square root that decides a bit"


def by_length(problem: object, text: str) -> float:
    """A reward that an untrained model earns at times."""
    return float(len(text))


def of_weights(model: ModelConfig, weights: Iterable[tuple[Parameter, torch.Tensor]]) -> str:
    digests: Leaves = {}
    for parameter, whole in weights:
        digests |= slice_digests(model, parameter, whole, WHOLE)
    return digest(digests)


def roundings() -> str:
    """What is left to torch: sums, products, quotients and conversions, with ties, subnormals and what overflows."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    words = (upper[:, None] + lower).flatten()
    single = (words - (words >> 31 << 32)).to(torch.int32).view(torch.float32)
    double = torch.arange(-1100, 1100).double().ldexp(torch.arange(-1100, 1100)) * (1 + 2.0**-24)
    keep = single[~single.isnan()]
    return sha256(
        [keep.to(torch.bfloat16), keep.to(torch.bfloat16).float(), double.float(), keep + 1e-45, keep * 0.5, keep / 3]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
