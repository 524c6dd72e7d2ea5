"""Problems as requests: each sample has its own seed, a function of the run's seed and of nothing that scheduling changes."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from rl.config import RunConfig
from rl.data import Problem
from rl.errors import UserError
from rollout.sampling import Request, RequestError, SamplingParams


def sample_seed(run_seed: int, purpose: str, step: int, problem: int, sample: int) -> int:
    """63 bits of SHA-256 over the five."""
    digest = hashlib.sha256(f"{run_seed}/{purpose}/{step}/{problem}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def train_sampling(config: RunConfig, ends: Sequence[int]) -> SamplingParams:
    """What is trained on, up to any of `ends`; the trainer cuts its distribution by the same filters."""
    asked = config.rollout
    return SamplingParams(
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        stop_ids=tuple(ends),
        top_k=asked.top_k,
        top_p=asked.top_p,
        min_p=asked.min_p,
    )


def eval_sampling(config: RunConfig, ends: Sequence[int]) -> SamplingParams:
    """Without filters."""
    return SamplingParams(config.rollout.max_new_tokens, config.eval.temperature, stop_ids=tuple(ends))


def check_sampling(config: RunConfig) -> None:
    """UserError where the sampler would refuse what is asked of it: before the warm start, and not after it."""
    for section, sampling in (("rollout", train_sampling), ("eval", eval_sampling)):
        try:
            sampling(config, ())
        except RequestError as error:
            raise UserError(f"{section}.{error}") from None


def requests_for(
    problems: Sequence[Problem], samples: int, sampling: SamplingParams, run_seed: int, purpose: str, step: int
) -> list[Request]:
    """`samples` requests for each problem, side by side, numbered from 0; `sampling` but for the seed."""
    return [
        Request(
            id=i * samples + j,
            prompt_ids=problem.prompt_ids,
            sampling=replace(sampling, seed=sample_seed(run_seed, purpose, step, i, j)),
        )
        for i, problem in enumerate(problems)
        for j in range(samples)
    ]
