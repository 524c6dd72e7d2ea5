"""What runs next: continuous batching with chunked prefill and preemption, first come first served. Pure Python.

The plan decides speed and nothing else: no bit of any completion depends on it. It is itself a pure function of the
requests, so the ranks of a tensor-parallel engine each compute it and agree without talking.
"""

from collections import deque
from dataclasses import dataclass, field

from rollout.pages import PagePool
from rollout.sampling import Completion, Request, RequestError


@dataclass(eq=False)  # two are the same only if they are one
class Sequence:
    """A request in flight. `computed` tokens have their keys and values in `pages`."""

    request: Request
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0

    @property
    def sampled(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    def finish_reason(self) -> str | None:
        if self.sampled and self.tokens[-1] in self.request.sampling.stop_ids:
            return "stop"
        return "length" if self.sampled == self.request.sampling.max_new_tokens else None


@dataclass(frozen=True)
class Span:
    """Compute positions `start <= p < stop` of a sequence; `samples` if that reaches its last token."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True)
class Limits:
    """None of these changes a bit of the output."""

    max_running: int  # sequences in one batch
    max_batch_tokens: int  # tokens computed in one step
    prefill_chunk: int  # tokens of one sequence computed in one step

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise RequestError(f"{name}={value} must be at least 1")


class Scheduler:
    def __init__(self, pool: PagePool, limits: Limits, max_positions: int) -> None:
        self.pool, self.limits, self.max_positions = pool, limits, max_positions
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.in_flight: set[int] = set()  # ids of both
        self.preemptions = 0

    def check(self, request: Request) -> None:
        """Raises RequestError if the request could never be served."""
        if request.id in self.in_flight:
            raise RequestError(f"request {request.id}: a request with this id is already in flight")
        if not request.prompt_ids:
            raise RequestError(f"request {request.id}: the prompt is empty")
        length = len(request.prompt_ids) + request.sampling.max_new_tokens
        capacity = self.pool.pages * self.pool.page_size
        if length > self.max_positions:
            raise RequestError(
                f"request {request.id}: {len(request.prompt_ids)} prompt + {request.sampling.max_new_tokens} new tokens "
                f"exceed the model's {self.max_positions} positions"
            )
        if length > capacity:
            raise RequestError(
                f"request {request.id}: {length} tokens do not fit the {capacity} of the key-value pages: raise "
                f"rollout.pages or lower max_new_tokens"
            )

    def add(self, request: Request) -> None:
        self.check(request)
        self.in_flight.add(request.id)
        self.waiting.append(Sequence(request, list(request.prompt_ids)))

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def clear(self) -> None:
        """Drops every request in flight."""
        for sequence in self.running:
            self._drop(sequence)
        self.running.clear()
        self.waiting.clear()

    def schedule(self) -> list[Span]:
        """The next batch; not empty unless idle. Running sequences go first, in order of arrival."""
        spans: list[Span] = []
        budget = self.limits.max_batch_tokens
        for sequence in list(self.running):
            if budget == 0 or sequence not in self.running:  # preempted by an older one
                continue
            span = self._extend(sequence, budget)
            if span:
                spans.append(span)
                budget -= span.stop - span.start
        while self.waiting and budget and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            sequence.pages = self.pool.match(sequence.tokens)
            sequence.computed = len(sequence.pages) * self.pool.page_size
            stop = self._stop(sequence, budget)
            fresh = self.pool.take(self.pool.needed(stop) - len(sequence.pages))
            if fresh is None:
                self._drop(sequence)
                break
            sequence.pages += fresh
            self.running.append(self.waiting.popleft())
            spans.append(Span(sequence, sequence.computed, stop))
            budget -= stop - sequence.computed
        return spans

    def commit(self, spans: list[Span], sampled: list[tuple[int, float]], version: int) -> list[Completion]:
        """Takes the result of a batch, one (token, log-prob) for each span that samples; returns what finished."""
        results = iter(sampled)
        finished = []
        for span in spans:
            sequence = span.sequence
            sequence.computed = span.stop
            self.pool.publish(sequence.tokens[: span.stop], sequence.pages)
            if not span.samples:
                continue
            token, logprob = next(results)
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if reason := sequence.finish_reason():
                self.running.remove(sequence)
                self.in_flight.remove(sequence.request.id)
                self._drop(sequence)
                prompt = len(sequence.request.prompt_ids)
                tokens, logprobs = tuple(sequence.tokens[prompt:]), tuple(sequence.logprobs)
                finished.append(Completion(sequence.request.id, tokens, logprobs, reason, version))
        return finished

    def _stop(self, sequence: Sequence, budget: int) -> int:
        return min(len(sequence.tokens), sequence.computed + min(budget, self.limits.prefill_chunk))

    def _extend(self, sequence: Sequence, budget: int) -> Span | None:
        """Pages for the next tokens of a running sequence, taken from the youngest where none are free."""
        stop = self._stop(sequence, budget)
        while (fresh := self.pool.take(self.pool.needed(stop) - len(sequence.pages))) is None:
            youngest = self.running.pop()
            self._drop(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return None
        sequence.pages += fresh
        return Span(sequence, sequence.computed, stop)

    def _drop(self, sequence: Sequence) -> None:
        """Frees the pages; the tokens and their recorded log-probs stay, and the keys will be computed again."""
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed = [], 0
