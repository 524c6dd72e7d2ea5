"""What a request asks of the sampler."""

import math
from dataclasses import dataclass


class RequestError(ValueError):
    """A request that cannot be served; one line that names the field and the number."""


@dataclass(frozen=True)
class SamplingParams:
    """The distribution a token is drawn from is softmax(logits / temperature); its log-probability is what is recorded.

    Temperature 0 is greedy; the log-probability recorded is then that of temperature 1. `seed` keys the noise together with
    the token's position, so a request's tokens depend on nothing but its prompt, these parameters and the weights.
    """

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 42
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not math.isfinite(self.temperature) or 0 < self.temperature < 1e-3 or self.temperature < 0:
            raise RequestError(
                f"temperature={self.temperature} must be 0 (greedy) or a finite number of at least 0.001"
            )
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed={self.seed} must be in 0 .. 2^63 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def scale(self) -> float:
        """The temperature that logits are divided by."""
        return 1.0 if self.greedy else self.temperature


@dataclass(frozen=True)
class Request:
    id: int  # chosen by the caller, unique among the requests in flight
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class Completion:
    request_id: int
    token_ids: tuple[int, ...]  # sampled tokens, with the stop token if one ended it
    logprobs: tuple[float, ...]  # of each sampled token, float32 values recorded while decoding
    finish_reason: str  # "stop" or "length"
    version: int  # of the weights that sampled it
