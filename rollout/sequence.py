"""Tracks one sample of a request while it is in flight, and the spans of it that steps compute."""

import math
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from rollout.pages import Path
from rollout.sampling import Completion, FinishReason, Request, Token, Top, sample_seed
from rollout.text import TextStream

NO_NUMBER = "no logit is a number; the weights or the activations overflowed"


class RunnerError(RuntimeError):
    """Says that the model produced no number to sample from."""


@dataclass(eq=False)
class Sequence:
    """Tracks one sample. `computed` tokens have their keys and values in `pages`, or will have once the steps that are
    launched have run: steps run in the order of their launch. It runs with no pages while it waits for a sibling that is
    computing what they share."""

    request: Request
    tokens: list[int]
    sample: int = 0
    text: TextStream | None = None  # where there are stop texts to find
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)  # of the weights that sampled each token
    prompt_logprobs: list[float] = field(default_factory=list)
    top: list[Top] = field(default_factory=list)  # of each sampled token, where it is asked for
    prompt_top: list[Top] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    published: int = 0  # tokens of `pages` that the cache has been told of
    path: Path = field(default_factory=Path)  # of those pages
    pending: int = 0  # tokens after `tokens` that launched steps sample, whose values are not known yet
    scoring: int = 0  # prompt log-probs after `prompt_logprobs`, likewise
    ended: bool = False  # finished or aborted: what launched steps still say of it is dropped
    running: bool = False
    cached: int | None = None  # tokens taken from the cache when it first ran
    chain: list[int] = field(default_factory=list)  # a name for each full page of the prompt and all before it
    ahead: "Sequence | None" = None  # the sibling that computes the first `until` tokens
    until: int = 0

    def __post_init__(self) -> None:
        self.seed = sample_seed(self.request.sampling.seed, self.sample)
        self.prompt = len(self.request.prompt_ids)
        self.most = self.prompt + self.request.sampling.max_new_tokens

    @property
    def samples(self) -> bool:
        """Tells whether it is to have tokens beside its prompt, which else is only computed and scored."""
        return self.most > self.prompt

    @property
    def sampled(self) -> int:
        """Counts the tokens sampled so far."""
        return len(self.tokens) - self.prompt

    @property
    def length(self) -> int:
        """Counts the tokens, known or pending."""
        return len(self.tokens) + self.pending

    @property
    def complete(self) -> bool:
        """Says whether nothing is left to launch, whatever the pending tokens are."""
        return self.length == self.most if self.samples else self.computed == self.prompt

    @property
    def scores_at(self) -> int | None:
        """Returns the place of the next prompt token whose log-prob is wanted and not under way."""
        if self.request.score_from is None:
            return None
        place = self.request.score_from + len(self.prompt_logprobs) + self.scoring
        return place if place < self.prompt else None

    @property
    def reusable(self) -> int:
        """Bounds the tokens whose keys may come from a cache, which are fewer than this: the last token, and what precedes a
        prompt token to score, must be computed for its hidden state."""
        return self.scores_at or self.length

    def append(self, token: int, logprob: float, top: Top, version: int) -> None:
        """Adds a token whose value is known now. RunnerError where it, or its log-prob, is no number."""
        if token < 0 or math.isnan(logprob):
            raise RunnerError(f"request {self.request.id}: {NO_NUMBER}")
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.request.top:
            self.top.append(top)
        self.versions.append(version)
        if self.text:
            self.text.push(token)

    def last(self, count: int, version: int) -> list[Token]:
        """Returns its last `count` tokens, which weights of `version` sampled."""
        out = []
        for i in range(self.sampled - count, self.sampled):
            top = self.top[i] if self.request.top else ()
            token = self.tokens[self.prompt + i]
            out.append(Token(self.request.id, self.sample, token, self.logprobs[i], version, top))
        return out

    def take_scores(self, given: Many[tuple[float, Top]]) -> None:
        """Takes the log-probs of the next prompt tokens, and where asked for the likeliest tokens of their places."""
        self.scoring -= len(given)
        for logprob, top in given:
            self.prompt_logprobs.append(logprob)
            if self.request.top:
                self.prompt_top.append(top)

    def forget_scores(self) -> None:
        """Drops the prompt's log-probs that were taken so far."""
        self.prompt_logprobs.clear()
        self.prompt_top.clear()

    def finish_reason(self) -> FinishReason | None:
        """Says why it ends, or None; asked after a token, or after all of a prompt that is only scored."""
        if not self.samples:
            return "length"
        if self.tokens[-1] in self.request.sampling.stop_ids or (self.text and self.text.matched is not None):
            return "stop"
        return "length" if len(self.tokens) == self.most else None

    def completion(self, reason: FinishReason, version: int) -> Completion:
        """Returns what it is so far. `version`: that of the engine, for a sample that has no token yet."""
        matched: int | str | None = None
        if reason == "stop":
            last = self.tokens[-1]
            if last in self.request.sampling.stop_ids:
                matched = last
            elif self.text:
                matched = self.text.matched
        return Completion(
            request_id=self.request.id,
            token_ids=tuple(self.tokens[self.prompt :]),
            logprobs=tuple(self.logprobs),
            finish_reason=reason,
            version=self.versions[-1] if self.versions else version,
            sampling=self.request.sampling,
            sample=self.sample,
            matched=matched,
            prompt_logprobs=tuple(self.prompt_logprobs),
            versions=tuple(self.versions) if len(set(self.versions)) > 1 else (),
            top=tuple(self.top),
            prompt_top=tuple(self.prompt_top),
            cached_tokens=self.cached or 0,
        )


_NOTHING = range(0)


@dataclass(slots=True, eq=False)  # not frozen: one is made for every sequence of every step
class Span:
    """Asks for positions `start <= p < stop` of a sequence. Planned by counts: the value of its last token may be known on the
    device alone. Of a guess it is the one position of a drafted token, right after the spans of the tokens before it."""

    sequence: Sequence
    start: int
    stop: int
    samples: bool  # it reaches the last token, and another is to follow
    pending: bool  # the last token is one that the step before this one samples
    scored: range  # places of the prompt tokens whose log-prob it gives: each follows a position that it computes
    guess: int | None = None  # the token at `start`, where nobody knows yet whether the step before it draws this one

    @classmethod
    def plan(cls, sequence: Sequence, stop: int) -> "Span":
        """Plans the positions from what is computed up to `stop`."""
        first = sequence.scores_at
        scored = _NOTHING if first is None else range(first, min(stop + 1, sequence.prompt))
        known = len(sequence.tokens)
        samples = sequence.samples and stop == known + sequence.pending
        return cls(sequence, sequence.computed, stop, samples, stop > known, scored)

    @classmethod
    def of_guess(cls, sequence: Sequence, place: int, token: int) -> "Span":
        """Plans the draw after a drafted token at `place`."""
        return cls(sequence, place, place + 1, True, False, _NOTHING, token)

    @property
    def decodes(self) -> bool:
        """Says whether it is one token, after which another is drawn, and nothing else is asked of it."""
        return self.samples and self.stop - self.start == 1 and not self.scored
