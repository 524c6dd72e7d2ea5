"""The schedule under any limits, with a model of one line and a memory that notices a wrong or stale key."""

import hashlib
from collections import Counter

from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout.pages import PagePool
from rollout.sampling import Completion, Request, SamplingParams
from rollout.scheduler import Limits, Scheduler, Span

STOP = 3
POSITIONS = 40


def next_token(tokens: tuple[int, ...], version: int) -> tuple[int, float]:
    """(token, log-prob): a function of all tokens before it and of the weights."""
    digest = hashlib.sha256(bytes(tokens) + bytes([version])).digest()
    return digest[0] % 4, -digest[1] / 16


def expected(request: Request, version: int) -> Completion:
    tokens, logprobs, reason = list(request.prompt_ids), [], "length"
    for _ in range(request.sampling.max_new_tokens):
        token, logprob = next_token(tuple(tokens), version)
        tokens.append(token)
        logprobs.append(logprob)
        if token in request.sampling.stop_ids:
            reason = "stop"
            break
    new = tuple(tokens[len(request.prompt_ids) :])
    return Completion(request.id, new, tuple(logprobs), reason, version)


class Schedule(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(1, 12),
        size=st.integers(1, 5),
        cache=st.sampled_from([True, True, False]),
        running=st.integers(1, 5),
        batch=st.integers(1, 20),
        chunk=st.integers(1, 9),
    )
    def start(self, pages: int, size: int, cache: bool, running: int, batch: int, chunk: int) -> None:
        self.limits = Limits(running, batch, chunk)
        self.pool = PagePool(pages, size, cache)
        self.scheduler = Scheduler(self.pool, self.limits, POSITIONS)
        self.version = 0
        self.requests: dict[int, Request] = {}
        self.done: dict[int, Completion] = {}
        self.seen: dict[int, tuple[list[int], list[float]]] = {}  # tokens and log-probs may only grow
        self.rows: dict[int, tuple[int, tuple[int, ...]]] = {}  # key-value row -> (version, prefix that it is a key of)
        self.work_left = 0  # steps in which everything must be over: the oldest advances in every step

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple),
        repeat=st.booleans(),
        new=st.integers(1, 8),
        stops=st.booleans(),
    )
    def add(self, prompt: tuple[int, ...], repeat: bool, new: int, stops: bool) -> None:
        if repeat and self.requests:  # the group of a problem: one prompt, many samples
            prompt = self.requests[len(self.requests) - 1].prompt_ids
        new = min(new, self.pool.pages * self.pool.page_size - len(prompt))
        if new < 1:
            return
        request = Request(len(self.requests), prompt, SamplingParams(new, stop_ids=(STOP,) if stops else ()))
        self.requests[request.id] = request
        self.scheduler.add(request)
        self.work_left += len(prompt) + new

    @rule(steps=st.integers(1, 6))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if not self.scheduler.idle:
                self.step()

    @precondition(lambda self: hasattr(self, "scheduler") and self.scheduler.idle)
    @rule()
    def new_weights(self) -> None:
        self.pool.clear()
        self.version = (self.version + 1) % 256

    def step(self) -> None:
        spans = self.scheduler.schedule()
        note(f"{[(s.sequence.request.id, s.start, s.stop) for s in spans]}")
        assert spans, "an empty batch with work to do"
        assert sum(s.stop - s.start for s in spans) <= self.limits.max_batch_tokens
        assert all(0 < s.stop - s.start <= self.limits.prefill_chunk for s in spans)
        assert len(self.scheduler.running) <= self.limits.max_running
        ids = [s.sequence.request.id for s in spans]
        assert len(set(ids)) == len(ids), "a sequence twice in a batch"
        assert ids == sorted(ids), "first come, first served"
        oldest = min(s.request.id for s in [*self.scheduler.running, *self.scheduler.waiting])
        assert ids[0] == oldest, "the oldest request did not advance"
        for span in spans:
            self.write(span)
        for span in spans:  # as in the model: all keys of the batch are written, then read
            self.read(span)
        sampled = [next_token(tuple(s.sequence.tokens), self.version) for s in spans if s.samples]
        for completion in self.scheduler.commit(spans, sampled, self.version):
            assert completion.request_id not in self.done
            assert completion == expected(self.requests[completion.request_id], self.version)
            self.done[completion.request_id] = completion
        self.work_left -= 1
        assert self.work_left >= 0, "more steps than tokens: something starves"

    def row(self, span: Span, position: int) -> int:
        size = self.pool.page_size
        return span.sequence.pages[position // size] * size + position % size

    def write(self, span: Span) -> None:
        sequence = span.sequence
        assert span.start == sequence.computed and span.stop <= len(sequence.tokens)
        assert len(sequence.pages) == self.pool.needed(span.stop), "more or fewer pages than the tokens need"
        owners = Counter(page for s in self.scheduler.running for page in s.pages)
        for position in range(span.start, span.stop):
            assert owners[self.row(span, position) // self.pool.page_size] == 1, "a shared page is written"
            self.rows[self.row(span, position)] = (self.version, tuple(sequence.tokens[: position + 1]))

    def read(self, span: Span) -> None:
        for position in range(span.stop):
            key = (self.version, tuple(span.sequence.tokens[: position + 1]))
            assert self.rows.get(self.row(span, position)) == key, f"position {position} reads another's key"

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        owned = Counter(page for s in self.scheduler.running for page in s.pages)
        assert sorted([*self.pool._free, *self.pool._idle, *owned]) == list(range(self.pool.pages))
        assert [owned[page] for page in range(self.pool.pages)] == self.pool._references
        for s in self.scheduler.running:
            assert len(set(s.pages)) == len(s.pages)
        for s in self.scheduler.waiting:
            assert not s.pages and not s.computed
        flying = [s.request.id for s in [*self.scheduler.running, *self.scheduler.waiting]]
        assert flying == sorted(flying) and {*flying, *self.done} == set(self.requests)
        for s in [*self.scheduler.running, *self.scheduler.waiting]:
            tokens, logprobs = self.seen.get(s.request.id, (list(s.request.prompt_ids), []))
            assert s.tokens[: len(tokens)] == tokens and s.logprobs[: len(logprobs)] == logprobs
            assert s.sampled == len(s.logprobs)
            self.seen[s.request.id] = (list(s.tokens), list(s.logprobs))

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while not self.scheduler.idle:
            self.step()
            self.the_books_balance()
        assert set(self.done) == set(self.requests)
        assert self.pool.available == self.pool.pages and not any(self.pool._references)


Schedule.TestCase.settings = settings(max_examples=250, stateful_step_count=25, deadline=None, derandomize=True)
TestSchedule = Schedule.TestCase


def finish(scheduler: Scheduler, version: int = 0) -> dict[int, Completion]:
    done = {}
    while not scheduler.idle:
        spans = scheduler.schedule()
        sampled = [next_token(tuple(s.sequence.tokens), version) for s in spans if s.samples]
        done |= {c.request_id: c for c in scheduler.commit(spans, sampled, version)}
    return done


def requests(count: int, prompt: tuple[int, ...] = (1, 0, 1, 1, 0), new: int = 10) -> list[Request]:
    return [Request(i, (*prompt, i % 2), SamplingParams(new)) for i in range(count)]


def test_preemption_happens_and_keeps_every_token() -> None:
    scheduler = Scheduler(PagePool(9, 2), Limits(4, 16, 4), POSITIONS)
    for request in requests(4):
        scheduler.add(request)
    done = finish(scheduler)
    assert scheduler.preemptions > 0
    assert done == {r.id: expected(r, 0) for r in requests(4)}


def test_the_largest_request_that_fits_the_pool_is_served() -> None:
    scheduler = Scheduler(PagePool(4, 4), Limits(8, 64, 64), POSITIONS)
    whole = Request(0, (1,) * 6, SamplingParams(10))
    scheduler.add(whole)
    for request in requests(3, new=4):
        scheduler.add(Request(request.id + 1, request.prompt_ids, request.sampling))
    assert finish(scheduler)[0] == expected(whole, 0)


def test_a_cached_prompt_is_not_computed_again() -> None:
    pool = PagePool(32, 2)
    scheduler = Scheduler(pool, Limits(8, 64, 64), POSITIONS)
    scheduler.add(Request(0, (1, 0, 1, 1, 0, 0), SamplingParams(1)))
    finish(scheduler)
    scheduler.add(Request(1, (1, 0, 1, 1, 0, 0), SamplingParams(1)))
    (span,) = scheduler.schedule()
    assert (span.start, span.stop) == (4, 6), "the last page is left, so that a token is computed"
    scheduler.add(Request(2, (1, 0, 1, 0), SamplingParams(1)))
    assert (scheduler.waiting[0].computed, pool.hit_tokens) == (0, 4)


def test_a_long_prompt_leaves_room_for_who_runs() -> None:
    """Chunked prefill: the batch of a decoding sequence is not held up by another's prompt."""
    scheduler = Scheduler(PagePool(32, 2), Limits(4, 5, 4), POSITIONS)
    scheduler.add(Request(0, (1,), SamplingParams(6)))
    first = scheduler.schedule()
    scheduler.commit(first, [(0, -1.0)], 0)
    scheduler.add(Request(1, (0,) * 20, SamplingParams(1)))
    for step in range(4):
        spans = scheduler.schedule()
        assert [(s.sequence.request.id, s.stop - s.start, s.samples) for s in spans] == [(0, 1, True), (1, 4, False)]
        scheduler.commit(spans, [(0, -1.0)], 0)
        assert scheduler.running[1].computed == 4 * (step + 1)
