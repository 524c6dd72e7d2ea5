"""Makes requests of problems: each sample has its own seed, a function of the run's seed and of nothing that scheduling
changes."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from rl.config import EvalSection, RolloutSection
from rl.data import Problem
from rl.errors import UserError
from rollout.sampling import Request, RequestError, SamplingParams


def sample_seed(run_seed: int, purpose: str, step: int, problem: int, sample: int) -> int:
    """Returns 63 bits of SHA-256 over the five."""
    digest = hashlib.sha256(f"{run_seed}/{purpose}/{step}/{problem}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def train_sampling(section: RolloutSection, ends: Sequence[int]) -> SamplingParams:
    """Says how the samples that are trained on are drawn; any of `ends` ends one."""
    return SamplingParams(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        stop_ids=tuple(ends),
        top_k=section.top_k,
        top_p=section.top_p,
        min_p=section.min_p,
    )


def eval_sampling(section: EvalSection, max_new_tokens: int, ends: Sequence[int]) -> SamplingParams:
    """Says how the samples of an evaluation are drawn: without filters."""
    return SamplingParams(max_new_tokens, section.temperature, stop_ids=tuple(ends))


def check_sampling(rollout: RolloutSection, evaluation: EvalSection) -> None:
    """Raises UserError where the sampler would refuse what is asked of it: before the warm start, and not after it."""
    asked = {
        "rollout": lambda: train_sampling(rollout, ()),
        "eval": lambda: eval_sampling(evaluation, rollout.max_new_tokens, ()),
    }
    for name, ask in asked.items():
        try:
            ask()
        except RequestError as error:
            raise UserError(f"{name}.{error}") from None


def requests_for(
    problems: Sequence[Problem],
    samples: int,
    sampling: SamplingParams,
    run_seed: int,
    purpose: str,
    step: int,
    first: int = 0,
) -> list[Request]:
    """Returns `samples` requests for each problem, side by side, numbered from 0; `sampling` but for the seed. `first`: the
    number of the first problem in the step."""
    return [
        Request(
            id=i * samples + j,
            prompt_ids=problem.prompt_ids,
            sampling=replace(sampling, seed=sample_seed(run_seed, purpose, step, first + i, j)),
        )
        for i, problem in enumerate(problems)
        for j in range(samples)
    ]
