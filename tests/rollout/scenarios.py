"""Engines over small models and the requests put to them. Imported by the ranks, so it needs neither pytest nor hypothesis."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from kernels.collectives import TreeGroup
from kernels.model import ModelConfig
from rollout.engine import Engine, EngineConfig
from rollout.sampling import Completion, Request, SamplingParams, Top
from rollout.scheduler import Limits
from tests.model.shapes import noise, random_weights

ROOMY = {
    "pages": 64,
    "page_size": 8,
    "prefix_cache": True,
    "running": 16,
    "batch": 256,
    "chunk": 64,
    "overlap": False,
    "speculate": "off",
}
LIMITS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "one at a time": {"running": 1},
    "chunks of 3": {"chunk": 3, "batch": 7},
    "one token a step": {"batch": 1},
    "pages of one token": {"page_size": 1, "pages": 512},
    "pages of 5": {"page_size": 5, "pages": 60},
    "no prefix cache": {"prefix_cache": False},
    "overlapped": {"overlap": True},
    "overlapped, one at a time": {"overlap": True, "running": 1},
    "overlapped, chunks of 3": {"overlap": True, "chunk": 3, "batch": 7},
    "overlapped, few pages": {"overlap": True, "page_size": 4, "pages": 23},
    "few pages": {"page_size": 4, "pages": 23},  # the longest request fits and little else: preemption
    "few pages, chunks, no cache": {"page_size": 3, "pages": 30, "chunk": 4, "batch": 9, "prefix_cache": False},
    "one page": {"page_size": 90, "pages": 1},
}


def engine(
    config: ModelConfig,
    seed: int = 0,
    group: TreeGroup | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    cuda_graphs: bool = False,
    **limits: Any,
) -> Engine:
    """With the random weights of `seed`, as version 7."""
    asked = ROOMY | limits
    limits_ = Limits(asked["running"], asked["batch"], asked["chunk"])
    shape = asked["pages"], asked["page_size"], asked["prefix_cache"]
    how = EngineConfig(*shape, limits_, dtype, device, cuda_graphs, asked["overlap"], speculate=asked["speculate"])
    out = Engine(config, how, group)
    out.load(random_weights(config, seed), 7)
    return out


def requests(config: ModelConfig) -> list[Request]:
    """Groups that share a prompt, prompts that share a part, short and long, greedy, cold, hot, stopped, cut."""
    ids = torch.randint(config.vocab_size, (80,), generator=torch.Generator().manual_seed(5)).tolist()
    stops = tuple(range(0, config.vocab_size, 9))
    cases = [
        (ids[:20], 12, 1.0, ()),
        (ids[:20], 12, 1.0, ()),
        (ids[:20], 12, 0.7, stops),
        (ids[:17] + ids[30:33], 9, 1.5, ()),
        (ids[:1], 14, 1.0, ()),
        (ids[:70], 20, 0.9, ()),  # past a block of attention keys
        (ids[:66], 4, 0.0, ()),
        (ids[40:43], 16, 3.0, stops),
        (ids[:8], 1, 0.3, ()),
        (ids[:20], 12, 0.0, stops),
    ]
    filters: dict[int, dict[str, Any]] = {
        1: {"top_p": 0.8},
        3: {"top_k": 12, "top_p": 0.9, "min_p": 0.01},
        5: {"min_p": 0.05},
        7: {"top_k": 9},
        9: {"top_k": 2},
    }
    return [
        Request(i, tuple(prompt), SamplingParams(new, temperature, 1000 + i, stop, **filters.get(i, {})))
        for i, (prompt, new, temperature, stop) in enumerate(cases)
    ]


def alone(
    config: ModelConfig, asked: Iterable[Request], seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[Completion]:
    """Each request in an engine of its own, without a cache: what every other way of serving it must equal."""
    return [engine(config, seed, None, dtype, prefix_cache=False).generate([request])[0] for request in asked]


def flat_head(config: ModelConfig) -> list:
    """Weights under which all logits are equal: every draw is decided by noise, every greedy choice by the tie rule."""
    return [(p, torch.zeros(p.shape) if p.name == "head" else w) for p, w in random_weights(config)]


def bits(completions: Sequence[Completion]) -> list[tuple]:
    """Everything a completion says, log-probs as float32 bit patterns."""
    return [
        (
            c.request_id,
            c.token_ids,
            logprob_bits(c),
            c.finish_reason,
            c.version,
            _bits(c.prompt_logprobs),
            [most_bits(top) for top in (*c.prompt_top, *c.top)],
        )
        for c in completions
    ]


def logprob_bits(completion: Completion) -> tuple[int, ...]:
    return _bits(completion.logprobs)


def most_bits(top: Top) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(i for i, _ in top), _bits([logprob for _, logprob in top])


def _bits(logprobs: Sequence[float]) -> tuple[int, ...]:
    values = torch.tensor(logprobs, dtype=torch.float64)
    assert torch.equal(values.float().double(), values), "a recorded log-prob is no float32"
    return tuple(values.float().view(torch.int32).tolist())


__all__ = ["LIMITS", "ROOMY", "alone", "bits", "engine", "flat_head", "logprob_bits", "most_bits", "noise", "requests"]
