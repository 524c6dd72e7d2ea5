"""Models of real widths, and the engine and the trainer over them. Imported by the ranks, so it needs no pytest."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernels.collectives import TreeGroup
from kernels.model import ModelConfig, Parameter, served
from kernels.model.known import QWEN3_0P6B, QWEN3_8B, QWEN3_30B_A3B
from rl.pack import pack
from rollout.engine import Engine, EngineConfig
from rollout.sampling import Completion, Request, SamplingParams
from rollout.scheduler import Limits
from tests.bits import assert_same_bits
from trainer.batch import Batch
from trainer.model import TrainerModel, batch_logprobs

SMALL, LARGE, EXPERTS = (
    replace(whole, layers=2, max_positions=2048) for whole in (QWEN3_0P6B, QWEN3_8B, QWEN3_30B_A3B)
)
WIDTHS = {"Qwen3-0.6B": SMALL, "Qwen3-8B": LARGE, "Qwen3-30B-A3B": EXPERTS}

ROOMY = {
    "pages": 512,
    "page_size": 16,
    "prefix_cache": True,
    "running": 256,
    "batch": 8192,
    "chunk": 8192,
    "graphs": False,
}


def weights(config: ModelConfig, device: str, seed: int = 0) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Float32, made on `device`: matrices of standard deviation 2 / sqrt(columns), embedding and norms around 1."""
    for p in served(config):
        generator = torch.Generator(device).manual_seed(seed + zlib.crc32(p.name.encode()))
        x = torch.randn(p.shape, generator=generator, device=device)
        yield p, 2 * x / p.columns**0.5 if p.columns else 1 + 0.2 * x


def engine(
    config: ModelConfig,
    whole: Iterable[tuple[Parameter, torch.Tensor]],
    device: str,
    group: TreeGroup | None = None,
    **limits: Any,
) -> Engine:
    """An engine that serves `whole` as version 0. Engine.load would hash gigabytes on the CPU as well."""
    asked = ROOMY | limits
    how = EngineConfig(
        asked["pages"],
        asked["page_size"],
        asked["prefix_cache"],
        Limits(asked["running"], asked["batch"], asked["chunk"]),
        torch.bfloat16,
        device,
        cuda_graphs=asked["graphs"],
        overlap=asked["graphs"],  # as they serve
    )
    out = Engine(config, how, group)
    for parameter, tensor in whole:
        out.runner.load(parameter, tensor)
    out.version = 0
    return out


def requests(config: ModelConfig, new: int = 10, longest: int = 600) -> list[Request]:
    """Groups that share a prompt or a part of one, lengths on both sides of a page, of a block of 64 keys and of a split of
    512, all temperatures and filters. The first few are what a small batch serves."""
    ids = np.random.default_rng(5).integers(0, config.vocab_size, 1024).tolist()
    lengths = [(0, 40), (0, 64), (100, 101), (0, 510), (0, 40), (7, 72), (0, 63), (50, 67), (0, longest), (0, 40)]
    temperatures = [1.0, 0.7, 1.3, 1.0, 1.0, 0.3, 0.0, 3.0, 0.9, 0.0]
    filters: dict[int, dict[str, Any]] = {1: {"top_p": 0.9}, 4: {"top_k": 50, "top_p": 0.7}, 8: {"min_p": 0.02}}
    return [
        Request(i, tuple(ids[first:last]), SamplingParams(new + i % 3, t, seed=1000 + i, **filters.get(i, {})))
        for i, ((first, last), t) in enumerate(zip(lengths, temperatures, strict=True))
    ]


def strangers(config: ModelConfig, count: int) -> list[Request]:
    """Requests that fill a batch and leave it one after another, so that it has every size on the way."""
    random = np.random.default_rng(6)
    prompts = [tuple(random.integers(0, config.vocab_size, 5 + i % 40).tolist()) for i in range(count)]
    return [Request(1000 + i, prompt, SamplingParams(1 + i % 12, seed=i)) for i, prompt in enumerate(prompts)]


def trainer_model(config: ModelConfig, whole: Iterable[tuple[Parameter, torch.Tensor]], device: str) -> TrainerModel:
    """The trainer's model on one rank, float32 masters, bfloat16 activations."""
    with torch.device("meta"):
        model = TrainerModel(config, torch.bfloat16)
    model.to_empty(device=device)
    model.table = tuple(t.to(device) for t in model.table)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for parameter, tensor in whole:
            named[parameter.name].copy_(tensor)
            if config.tied and parameter.name == "embed":
                model.head.copy_(tensor)
    return model


def batch_of(asked: Sequence[Request], done: Sequence[Completion], advantage: float = 1.0) -> Batch:
    """One batch of all, each token weighted alike."""
    total = sum(len(c.token_ids) for c in done)
    advantages, weights = np.full((2, total), [[advantage], [1 / total]], dtype=np.float32)
    return pack([(r.prompt_ids, c) for r, c in zip(asked, done, strict=True)], advantages, weights)


@torch.no_grad()
def score(model: TrainerModel, batch: Batch) -> torch.Tensor:
    """float32 [R] on the CPU: the whole batch as one micro-batch, one sequence a leaf."""
    return batch_logprobs(model, batch, 1, model.head.device).cpu()


def logprobs(done: Completion) -> torch.Tensor:
    return torch.tensor(done.logprobs, dtype=torch.float64).float()


def assert_same_completions(actual: Sequence[Completion], expected: Sequence[Completion], what: str) -> None:
    """Token for token and bit for bit; log-probs first, as they say more. Says which request, token and bit patterns."""
    __tracebackhide__ = True
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        where = f"{what}: request {e.request_id}"
        same = min(len(a.token_ids), len(e.token_ids))
        assert_same_bits(logprobs(a)[:same], logprobs(e)[:same], f"{where}, log-probs")
        assert_same_bits(torch.tensor(a.token_ids), torch.tensor(e.token_ids), f"{where}, tokens")
