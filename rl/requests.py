"""Problems as requests: each sample has its own seed, a function of the run's seed and of nothing that scheduling changes."""

import hashlib
from collections.abc import Sequence

from rl.config import RunConfig
from rl.data import Problem
from rollout.sampling import Request, SamplingParams


def sample_seed(run_seed: int, purpose: str, step: int, problem: int, sample: int) -> int:
    """63 bits of SHA-256 over the five."""
    digest = hashlib.sha256(f"{run_seed}/{purpose}/{step}/{problem}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def requests_for(
    problems: Sequence[Problem],
    samples: int,
    config: RunConfig,
    eos_id: int,
    purpose: str,
    step: int,
    temperature: float,
) -> list[Request]:
    """`samples` requests for each problem, side by side, numbered from 0."""
    return [
        Request(
            id=i * samples + j,
            prompt_ids=problem.prompt_ids,
            sampling=SamplingParams(
                max_new_tokens=config.rollout.max_new_tokens,
                temperature=temperature,
                seed=sample_seed(config.seed, purpose, step, i, j),
                stop_ids=(eos_id,),
            ),
        )
        for i, problem in enumerate(problems)
        for j in range(samples)
    ]
