"""Defines requests, how they are sampled, and completions."""

import hashlib
import math
from dataclasses import dataclass, field
from typing import Literal

Top = tuple[tuple[int, float], ...]
"""The most likely tokens of a place with their log-probs, by falling logit and, among equals, by rising id."""


class RequestError(ValueError):
    """Says that a request cannot be served; one line that names the field and the number."""


def sample_seed(seed: int, sample: int) -> int:
    """Returns the seed of the i-th of a request's n samples: the first is the request's own, so that it does not depend on n;
    the others are 63 bits of SHA-256 over "seed/sample/i"."""
    if sample == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/sample/{sample}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class SamplingParams:
    """Says how a token is drawn: from softmax(logits / temperature), cut to what top_k, then top_p, then min_p keep, and
    renormalised; the log-probability recorded is that of this distribution. `kernels.ops.kept_tokens` has the definition,
    ties included.

    Temperature 0 is greedy: the most likely token (the lowest id of several), which every filter keeps; the log-probability
    recorded is then that of softmax(logits), as if there were no filter. `seed` keys the noise together with the token's
    position, so a request's tokens depend on nothing but its prompt, these parameters and the weights.

    A text ends at the first of: a token of `stop_ids`; a text of `stop`, found in the text decoded so far; `max_new_tokens`,
    which may be 0: the prompt is computed, and scored where that is asked for.
    The end-of-text token of a model is a stop id like any other: who knows the tokenizer adds it, unless told to ignore it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 42
    stop_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()  # needs an engine that can decode
    n: int = 1  # samples, each of its own seed stream: `sample_seed`
    top_k: int = 0  # the k most likely tokens; 0: no limit
    top_p: float = 1.0  # the most likely tokens that together have this probability; 1: no limit
    min_p: float = 0.0  # tokens of at least this times the probability of the most likely one; 0: no limit

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise RequestError(f"max_new_tokens={self.max_new_tokens} must be at least 0")
        if not math.isfinite(self.temperature) or 0 < self.temperature < 1e-3 or self.temperature < 0:
            raise RequestError(
                f"temperature={self.temperature} must be 0 (greedy) or a finite number of at least 0.001"
            )
        if self.temperature > 1e6:
            raise RequestError(f"temperature={self.temperature} must be at most 1000000")
        if not 0 <= self.seed < 2**63:
            raise RequestError(f"seed={self.seed} must be in 0 .. 2^63 - 1")
        if self.n < 1:
            raise RequestError(f"n={self.n} must be at least 1")
        if not 0 <= self.top_k < 2**63:
            raise RequestError(f"top_k={self.top_k} must be in 0 .. 2^63 - 1 (0: no limit)")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p={self.min_p} must be in 0 .. 1")
        if "" in self.stop:
            raise RequestError("stop: an empty text stops nothing")

    @property
    def greedy(self) -> bool:
        """Says whether the most likely token is taken instead of a drawn one."""
        return self.temperature == 0

    @property
    def filters(self) -> tuple[int, float, float]:
        """Returns top_k, top_p and min_p as they apply: not to greedy sampling."""
        return (0, 1.0, 0.0) if self.greedy else (self.top_k, self.top_p, self.min_p)

    @property
    def truncated(self) -> bool:
        """Says whether a filter may cut the distribution."""
        return self.filters != (0, 1.0, 0.0)

    @property
    def scale(self) -> float:
        """Returns the temperature that logits are divided by."""
        return 1.0 if self.greedy else self.temperature


@dataclass(frozen=True)
class Request:
    """Asks for the samples of one prompt. `score_from`: also the log-probs of the prompt tokens from this place on, 1 at the
    least (the first token follows nothing). They are those of the sampling temperature over the whole vocabulary (nobody drew
    them, so no filter applies), and have the bits that the trainer computes.

    `top`: also the so many most likely tokens, of each place that is sampled (of the distribution drawn from, so fewer where a
    filter keeps fewer) and of each that is scored (of the whole vocabulary)."""

    id: int  # chosen by the caller, unique among the requests in flight
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    score_from: int | None = None
    top: int = 0

    def __post_init__(self) -> None:
        if self.score_from is not None and self.score_from < 1:
            raise RequestError(f"request {self.id}: score_from={self.score_from} must be at least 1")
        if self.top < 0:
            raise RequestError(f"request {self.id}: top={self.top} must be at least 0")


@dataclass(frozen=True)
class Token:
    """Holds a sampled token, as soon as it is known."""

    request_id: int
    sample: int
    id: int
    logprob: float
    version: int  # of the weights that sampled it
    top: Top = ()  # what its request asked for


FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Completion:
    """Holds one sample of a request."""

    request_id: int
    token_ids: tuple[int, ...]  # sampled tokens, with the stop token or all tokens of the stop text if one ended it
    logprobs: tuple[float, ...]  # of each sampled token, float32 values recorded while decoding
    finish_reason: FinishReason
    version: int  # of the weights that sampled the last token
    sampling: SamplingParams = field(compare=False)  # what it was asked with: temperature and filters of each log-prob
    sample: int = 0  # which of the request's n
    matched: int | str | None = None  # the stop id or the stop text that ended it
    prompt_logprobs: tuple[float, ...] = ()  # of the prompt tokens from score_from on
    versions: tuple[
        int, ...
    ] = ()  # of each token, where the weights changed in flight; empty where `version` sampled all
    top: tuple[Top, ...] = ()  # of each sampled token, where the request asked for it
    prompt_top: tuple[Top, ...] = ()  # of each prompt token from score_from on, likewise
    cached_tokens: int = field(default=0, compare=False)  # of the prompt, that were not computed: no part of the result

    @property
    def token_versions(self) -> tuple[int, ...]:
        """Returns the version of the weights that sampled each token."""
        return self.versions or (self.version,) * len(self.token_ids)
