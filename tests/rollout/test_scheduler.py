"""The schedule under any limits, with a model of one line and a memory that notices a wrong or stale key."""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout.pages import PagePool
from rollout.sampling import Completion, Request, SamplingParams, Top, sample_seed
from rollout.scheduler import Limits, Scheduler
from rollout.sequence import Sequence, Span

STOP = 3
POSITIONS = 40


def next_token(tokens: tuple[int, ...], version: int, seed: int = 42) -> tuple[int, float]:
    """(token, log-prob): a function of all tokens before it, of the weights and of the seed."""
    digest = hashlib.sha256(bytes(tokens) + bytes([version, seed % 256])).digest()
    return digest[0] % 4, -digest[1] / 16


def score(tokens: tuple[int, ...], version: int) -> float:
    """The log-prob of the last of these tokens, given those before it."""
    return -hashlib.sha256(bytes(tokens) + bytes([version])).digest()[2] / 16


def expected(
    request: Request, version: int, sample: int = 0, versions: tuple[int, ...] = (), aborted: bool = False
) -> Completion:
    """`versions`: of each token, where the weights changed in flight; all of an aborted one's tokens."""
    prompt, logprobs, reason, matched = request.prompt_ids, [], "length", None
    tokens, seed = list(prompt), sample_seed(request.sampling.seed, sample)
    for i in range(len(versions) if aborted else request.sampling.max_new_tokens):
        token, logprob = next_token(tuple(tokens), versions[i] if versions else version, seed)
        tokens.append(token)
        logprobs.append(logprob)
        if token in request.sampling.stop_ids:
            reason, matched = "stop", token
            break
    first = versions[0] if versions else version
    places = range(request.score_from or len(prompt), len(prompt))
    return Completion(
        request_id=request.id,
        token_ids=tuple(tokens[len(prompt) :]),
        logprobs=tuple(logprobs),
        finish_reason="abort" if aborted else reason,
        version=versions[-1] if versions else version,
        sampling=request.sampling,
        sample=sample,
        matched=None if aborted else matched,
        prompt_logprobs=tuple(score(prompt[: place + 1], first) for place in places),
        versions=versions if len(set(versions)) > 1 else (),
    )


class Schedule(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(1, 12),
        size=st.integers(1, 5),
        cache=st.sampled_from([True, True, False]),
        running=st.integers(1, 5),
        batch=st.integers(1, 20),
        chunk=st.integers(1, 9),
        overlap=st.booleans(),
        drafts=st.sampled_from([0, 0, 1, 2, 3]),
    )
    def start(
        self, pages: int, size: int, cache: bool, running: int, batch: int, chunk: int, overlap: bool, drafts: int
    ) -> None:
        """`overlap`: a batch is planned before the results of the one before it are committed. `drafts`: how many of four
        steps are drafted for."""
        self.overlap, self.drafts, self.steps = overlap, drafts, 0
        self.guessed: dict[Sequence, list[int]] = {}  # of the batch that is planned
        self.launched: list[tuple[list[Span], tuple]] = []  # with what the runner will say of them
        self.truth: dict[Sequence, list[int]] = {}  # its tokens, the pending ones too, as the device knows them
        self.limits = Limits(running, batch, chunk)
        self.pool = PagePool(pages, size, cache)
        self.scheduler = Scheduler(self.pool, self.limits, POSITIONS)
        self.version = 0
        self.requests: dict[int, Request] = {}
        self.done: dict[tuple[int, int], Completion] = {}
        self.seen: dict[tuple[int, int], tuple[list[int], list[float]]] = {}  # tokens and log-probs may only grow
        self.rows: dict[int, tuple[int, tuple[int, ...]]] = {}  # key-value row -> (version, prefix that it is a key of)
        self.work_left = 0  # steps in which everything must be over: the oldest advances in every step

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple),
        repeat=st.booleans(),
        new=st.integers(0, 8),
        stops=st.booleans(),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        score_from=st.sampled_from([None, None, 1, 3]),
    )
    def add(self, prompt: tuple[int, ...], repeat: bool, new: int, stops: bool, n: int, score_from: int | None) -> None:
        if repeat and self.requests:  # the group of a problem: one prompt, many samples
            prompt = self.requests[len(self.requests) - 1].prompt_ids
        new = min(new, self.pool.pages * self.pool.page_size - len(prompt))
        if new < 0:
            return
        asked = SamplingParams(new, stop_ids=(STOP,) if stops else (), n=n)
        request = Request(len(self.requests), prompt, asked, score_from)
        self.requests[request.id] = request
        self.scheduler.add(request)
        self.work_left += n * (len(prompt) + new) * (1 + self.overlap)

    def flying(self) -> list[Sequence]:
        return [*self.scheduler.running, *self.scheduler.waiting]

    @precondition(lambda self: hasattr(self, "scheduler") and not self.scheduler.idle)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        ids = sorted({s.request.id for s in self.flying()})
        request_id = ids[which % len(ids)]
        left = {s.sample: tuple(s.versions) for s in self.flying() if s.request.id == request_id}
        for completion in self.scheduler.abort(request_id, self.version):
            versions = left.pop(completion.sample)
            whole = expected(self.requests[request_id], self.version, completion.sample, versions, aborted=True)
            assert completion.prompt_logprobs == whole.prompt_logprobs[: len(completion.prompt_logprobs)]
            assert replace(completion, prompt_logprobs=whole.prompt_logprobs) == whole
            self.done[request_id, completion.sample] = completion
        assert not left, "a sample in flight was not ended"
        assert self.scheduler.abort(request_id, self.version) == []

    @rule(steps=st.integers(1, 6))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if not self.scheduler.idle:
                self.step()

    @precondition(lambda self: hasattr(self, "scheduler"))
    @rule()
    def new_weights(self) -> None:
        """Under the policy "resume"."""
        while self.launched:
            self.commit()
        self.scheduler.restart()
        self.pool.clear()
        self.work_left += sum(len(s.tokens) for s in self.flying()) * (1 + self.overlap)
        self.version = (self.version + 1) % 256

    def step(self) -> None:
        left = [(s.request.id, s.sample) for s in self.flying() if not s.complete]
        waits = len(left) < len(self.flying())  # for a pending token that ends a sequence
        self.steps += 1
        guess = self.guess if self.steps % 4 < self.drafts else None
        if guess or (self.launched and any(s.guess is not None for s in self.launched[-1][0])):
            while self.launched:
                self.commit()
            if self.scheduler.idle:
                return
            waits = False
            left = [(s.request.id, s.sample) for s in self.flying()]
        spans = self.scheduler.schedule(guess)
        note(f"{[(s.sequence.request.id, s.start, s.stop, s.guess) for s in spans]}")
        assert spans or waits, "an empty batch with work to do"
        assert sum(s.stop - s.start for s in spans) <= self.limits.max_batch_tokens
        assert all(0 < s.stop - s.start <= self.limits.prefill_chunk for s in spans)
        assert len(self.scheduler.running) <= self.limits.max_running and len(spans) <= max(
            self.limits.rows, len(self.scheduler.running)
        )
        ids = [(s.sequence.request.id, s.sequence.sample) for s in spans if s.guess is None]
        assert len(set(ids)) == len(ids), "a sequence twice in a batch"
        assert ids == sorted(ids), "first come, first served"
        assert waits or ids[0] == min(left), "the oldest request did not advance"
        self.guesses = any(span.guess is not None for span in spans)
        for span in spans:
            self.write(span)
        for span in spans:  # as in the model: all keys of the batch are written, then read
            self.read(span)
        if spans:
            self.launched.append((spans, self.results(spans)))
        for span in spans:
            if span.samples and not any(s.guess is not None for s in spans):
                sequence = span.sequence
                self.tokens(sequence).append(next_token(tuple(self.tokens(sequence)), self.version, sequence.seed)[0])
        if len(self.launched) > self.overlap or not spans:
            self.commit()
        self.work_left -= 1
        assert self.work_left >= 0, "more steps than tokens: something starves"

    def guess(self, spans: list[Span], room: int) -> list[list[int]]:
        """Right ones, wrong ones and stops, more than there is room for."""
        out = []
        for span in spans:
            tokens, drafted = list(self.tokens(span.sequence)), []
            for i in range(6):
                token = next_token(tuple(tokens), self.version, span.sequence.seed)[0]
                tokens.append((token + (self.steps + len(tokens) + i) % 3 // 2) % 4)
                drafted.append(tokens[-1])
            out.append(drafted[: (self.steps + span.start) % 7])
        return out

    def results(self, spans: list[Span]) -> tuple:
        """What a runner says of a batch, of which only right guesses have results."""
        if all(s.guess is None for s in spans):
            return results(spans, self.version, self.tokens)
        sampled: list = []
        for span in spans:
            if span.guess is None:
                said, right = list(self.tokens(span.sequence)), True
            right = right and (span.guess is None or said[-1] == span.guess)
            drawn = next_token(tuple(said), self.version, span.sequence.seed)
            said.append(drawn[0])
            sampled.append((*drawn, ()) if right else None)
        return sampled, []

    def tokens(self, sequence: Sequence) -> list[int]:
        return self.truth.setdefault(sequence, list(sequence.tokens))

    def commit(self) -> None:
        spans, (sampled, scored) = self.launched.pop(0)
        before = {(s.request.id, s.sample): s.versions[:] for s in self.flying()}
        for completion in self.scheduler.commit(spans, sampled, self.version, scored):
            key = completion.request_id, completion.sample
            assert key not in self.done
            new = len(completion.token_ids) - len(before[key])
            versions = (*before[key], *[self.version] * max(new, 1))
            assert completion == expected(self.requests[key[0]], self.version, key[1], versions)
            self.done[key] = completion
        guesses = any(span.guess is not None for span in spans)
        for sequence in (span.sequence for span in spans if guesses and not span.sequence.ended):
            self.truth[sequence] = list(sequence.tokens)
        for span in spans:
            if span.guess is not None and not span.sequence.ended:
                sequence = span.sequence
                assert sequence.computed == len(sequence.tokens) - 1 and sequence.pending == 0
                assert len(sequence.pages) == self.pool.needed(sequence.computed), "a page of wrong guesses is held"
        if self.scheduler.idle:
            assert all(span.sequence.ended for spans, _ in self.launched for span in spans)
            self.launched.clear()

    def row(self, span: Span, position: int) -> int:
        size = self.pool.page_size
        return span.sequence.pages[position // size] * size + position % size

    def write(self, span: Span) -> None:
        sequence, tokens = span.sequence, self.tokens(span.sequence)
        if span.guess is not None:
            tokens = [*tokens[: sequence.computed], *self.guessed[sequence], span.guess]
            self.guessed[sequence].append(span.guess)
            assert len(tokens) == span.stop and span.start >= sequence.computed == len(self.tokens(sequence))
            assert span.stop < sequence.most, "a guess that nothing could follow"
        else:
            self.guessed[sequence] = []
            assert span.stop == sequence.computed <= len(tokens)
        assert span.pending == (span.guess is None and span.stop > len(sequence.tokens))
        assert self.overlap or not span.pending
        if span.pending:  # the runner finds it among the tokens of the batch before
            assert any(s.sequence is sequence and s.samples for s in self.launched[-1][0])
        held = len(sequence.pages)
        assert held >= self.pool.needed(span.stop) and (self.guesses or held == self.pool.needed(span.stop))
        owners = Counter(page for s in self.scheduler.running for page in s.pages)
        for position in range(span.start, span.stop):
            assert owners[self.row(span, position) // self.pool.page_size] == 1, "a shared page is written"
            self.rows[self.row(span, position)] = (self.version, tuple(tokens[: position + 1]))

    def read(self, span: Span) -> None:
        tokens = [*self.tokens(span.sequence), *(self.guessed[span.sequence] if span.guess is not None else [])]
        for position in range(span.stop):
            key = (self.version, tuple(tokens[: position + 1]))
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
        flying = [(s.request.id, s.sample) for s in self.flying()]
        assert flying == sorted(flying) and {*flying, *self.done} == self.asked()
        assert self.scheduler.in_flight == Counter(request_id for request_id, _ in flying)
        guessing = any(span.guess is not None for spans, _ in self.launched for span in spans)
        for s in self.flying():
            tokens, logprobs = self.seen.get((s.request.id, s.sample), (list(s.request.prompt_ids), []))
            assert s.tokens[: len(tokens)] == tokens and s.logprobs[: len(logprobs)] == logprobs
            assert s.sampled == len(s.logprobs) == len(s.versions)
            assert s.running == (s in self.scheduler.running)
            mine = [span for spans, _ in self.launched for span in spans if span.sequence is s]
            assert s.pending == sum(span.samples for span in mine) and s.scoring == sum(len(p.scored) for p in mine)
            assert self.tokens(s)[: len(s.tokens)] == s.tokens
            assert (
                len(self.tokens(s)) == s.length or guessing
            )  # what a batch with guesses says is known when it is taken
            self.seen[s.request.id, s.sample] = (list(s.tokens), list(s.logprobs))

    def asked(self) -> set[tuple[int, int]]:
        return {(r.id, sample) for r in self.requests.values() for sample in range(r.sampling.n)}

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        while not self.scheduler.idle:
            self.step()
            self.the_books_balance()
        assert set(self.done) == self.asked()
        assert self.pool.available == self.pool.pages and not any(self.pool._references)


Schedule.TestCase.settings = settings(max_examples=250, stateful_step_count=25, deadline=None, derandomize=True)
TestSchedule = Schedule.TestCase


def results(
    spans: list[Span], version: int, tokens: Callable[[Sequence], list[int]] = lambda sequence: sequence.tokens
) -> tuple[list[tuple[int, float, Top]], list[list[tuple[float, Top]]]]:
    """What a runner says of a batch."""
    sampled = [(*next_token(tuple(tokens(s.sequence)), version, s.sequence.seed), ()) for s in spans if s.samples]
    scored = [[(score(tuple(tokens(s.sequence)[: p + 1]), version), ()) for p in s.scored] for s in spans if s.scored]
    return sampled, scored


def finish(scheduler: Scheduler, version: int = 0) -> dict[int, Completion]:
    """By request, of requests of one sample."""
    done = {}
    while not scheduler.idle:
        spans = scheduler.schedule()
        sampled, scored = results(spans, version)
        done |= {c.request_id: c for c in scheduler.commit(spans, sampled, version, scored)}
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
    cached = [done[i].cached_tokens for i in range(4)]
    assert cached == [0, 4, 4, 4], "of the prompt, when it first ran: not what it found when it ran again"


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
    scheduler.commit(first, [(0, -1.0, ())], 0)
    scheduler.add(Request(1, (0,) * 20, SamplingParams(1)))
    for step in range(4):
        spans = scheduler.schedule()
        assert [(s.sequence.request.id, s.stop - s.start, s.samples) for s in spans] == [(0, 1, True), (1, 4, False)]
        scheduler.commit(spans, [(0, -1.0, ())], 0)
        assert scheduler.running[1].computed == 4 * (step + 1)


def test_a_prompt_that_would_be_cut_waits_where_others_fill_the_batch() -> None:
    scheduler = Scheduler(PagePool(64, 2), Limits(8, 16, 16), POSITIONS)
    for i in range(4):
        scheduler.add(Request(i, (i,) * 6, SamplingParams(2)))
    scheduler.add(Request(4, (4,) * 20, SamplingParams(2)))  # longer than a chunk: it is cut anyway
    first = scheduler.schedule()
    assert [(s.sequence.request.id, s.start, s.stop) for s in first] == [(0, 0, 6), (1, 0, 6)]
    scheduler.commit(first, *results(first, 0)[:1], 0)
    second = scheduler.schedule()
    assert [(s.sequence.request.id, s.start, s.stop) for s in second] == [(0, 6, 7), (1, 6, 7), (2, 0, 6), (3, 0, 6)]
    scheduler.commit(second, *results(second, 0)[:1], 0)
    third = scheduler.schedule()
    assert [(s.sequence.request.id, s.start, s.stop) for s in third] == [(2, 6, 7), (3, 6, 7), (4, 0, 14)]
    scheduler.commit(third, *results(third, 0)[:1], 0)
    assert finish(scheduler).keys() == {4}


def computed(n: int, prompt: tuple[int, ...], page_size: int = 4, cache: bool = True, chunk: int = 64) -> int:
    """Tokens computed for n samples of one prompt that are admitted together."""
    scheduler = Scheduler(PagePool(64, page_size, cache), Limits(16, 256, chunk), POSITIONS)
    scheduler.add(Request(0, prompt, SamplingParams(3, n=n)))
    finish(scheduler)
    return scheduler.computed_tokens


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 17, 24])
def test_siblings_share_the_computation_of_their_prompt(length: int, chunk: int) -> None:
    prompt, n = tuple(i % 3 for i in range(length)), 5
    alone = computed(1, prompt, chunk=chunk)
    assert alone == length + 2, "the last token sampled is not computed"
    shared = (length - 1) // 4 * 4
    assert computed(n, prompt, chunk=chunk) == n * alone - (n - 1) * shared
    assert computed(n, prompt, cache=False, chunk=chunk) == n * alone


def test_siblings_wait_for_what_they_share_and_no_longer() -> None:
    """Prompts with a common start: the second waits for that part of the first one's prompt, not for the rest."""
    scheduler = Scheduler(PagePool(64, 2), Limits(8, 100, 4), POSITIONS)
    scheduler.add(Request(0, (1, 1, 1, 1, *(0,) * 16), SamplingParams(1)))
    scheduler.add(Request(1, (1, 1, 1, 1, 2, 2, 2), SamplingParams(1)))
    scheduler.add(Request(2, (2, 2, 2), SamplingParams(1)))
    first = scheduler.schedule()
    assert [(s.sequence.request.id, s.start, s.stop) for s in first] == [(0, 0, 4), (2, 0, 3)]
    scheduler.commit(first, *results(first, 0)[:1], 0)
    assert [(s.sequence.request.id, s.start, s.stop) for s in scheduler.schedule()] == [(0, 4, 8), (1, 4, 7)]


def test_who_waited_for_an_aborted_sibling_computes_itself() -> None:
    scheduler = Scheduler(PagePool(64, 2), Limits(8, 100, 4), POSITIONS)
    for i in range(3):
        scheduler.add(Request(i, (1,) * 12, SamplingParams(1)))
    first = scheduler.schedule()
    scheduler.commit(first, *results(first, 0)[:1], 0)
    assert [s.sequence.request.id for s in first] == [0] and len(scheduler.running) == 3
    scheduler.abort(0, 0)
    second = scheduler.schedule()
    assert [(s.sequence.request.id, s.start, s.stop) for s in second] == [(1, 4, 8)]
    scheduler.commit(second, *results(second, 0)[:1], 0)
    assert finish(scheduler).keys() == {1, 2}


def test_a_scored_prompt_takes_from_the_cache_what_precedes_the_score() -> None:
    scheduler = Scheduler(PagePool(64, 2), Limits(8, 100, 100), POSITIONS)
    prompt = (1, 0, 2, 1, 0, 2, 1, 0)
    scheduler.add(Request(0, prompt, SamplingParams(1)))
    finish(scheduler)
    for score_from, start in [(1, 0), (2, 0), (3, 2), (4, 2), (5, 4), (8, 6), (20, 6)]:
        scheduler.add(Request(1, prompt, SamplingParams(1), score_from))
        (span,) = scheduler.schedule()
        assert (span.start, span.stop, list(span.scored)) == (start, 8, list(range(score_from, 8)))
        (done,) = scheduler.commit([span], *results([span], 0)[:1], 0, results([span], 0)[1])
        assert done == expected(Request(1, prompt, SamplingParams(1), score_from), 0)
        assert done.cached_tokens == start


@pytest.mark.parametrize("state", ["waiting", "prefilling", "held", "running", "preempted"])
def test_abort_frees_the_pages_in_any_state(state: str) -> None:
    scheduler = Scheduler(PagePool(9, 2, prefix_cache=state == "held"), Limits(4, 16, 4), POSITIONS)
    prompts = {"held": (1,) * 8}
    for i in range(1 if state in ("waiting", "prefilling", "running") else 3):
        scheduler.add(Request(i, prompts.get(state, (i % 3,) * 6), SamplingParams(10)))
    victim = len(scheduler.in_flight) - 1

    def now() -> str:
        (s,) = [s for s in (*scheduler.running, *scheduler.waiting) if s.request.id == victim]
        if not s.running:
            return "preempted" if s.sampled else "waiting"
        return "held" if not s.pages else "running" if s.sampled else "prefilling"

    while now() != state:
        spans = scheduler.schedule()
        scheduler.commit(spans, *results(spans, 0)[:1], 0)
    (done,) = scheduler.abort(victim, 0)
    assert done.finish_reason == "abort" and bool(done.token_ids) == (state in ("running", "preempted"))
    owned = [p for s in scheduler.running for p in s.pages]
    assert scheduler.pool.available == scheduler.pool.pages - len(set(owned))
    assert finish(scheduler).keys() == set(range(victim))
    assert scheduler.pool.available == scheduler.pool.pages and scheduler.in_flight == {}


def test_a_thousand_running_requests_are_scheduled_fast() -> None:
    """No part of the plan is quadratic in the requests: 1,000 of them, of which a group waits for a sibling."""
    scheduler = Scheduler(PagePool(10_000, 4), Limits(1000, 4000, 64), POSITIONS)
    for i in range(50):
        scheduler.add(Request(i, (*(i % 3,) * 12, i % 4, i // 16), SamplingParams(4, n=20)))
    begin = time.perf_counter()
    finish(scheduler)
    assert time.perf_counter() - begin < 30


def test_a_soak_with_random_aborts_leaks_no_page() -> None:
    """5,000 requests, some of several samples, two aborts a step."""
    chance = random.Random(0)
    scheduler = Scheduler(PagePool(150, 4), Limits(64, 512, 32), POSITIONS)
    asked = ended = 0
    while asked < 5000 or not scheduler.idle:
        while asked < 5000 and len(scheduler.in_flight) < 150:
            prompt = tuple(chance.randrange(3) for _ in range(chance.randint(1, 24)))
            scheduler.add(Request(asked, prompt, SamplingParams(chance.randint(1, 12), n=chance.choice([1, 1, 2]))))
            asked += 1
        flying = list(scheduler.in_flight)
        for request_id in chance.sample(flying, min(2, len(flying))):
            ended += len(scheduler.abort(request_id, 0))
        spans = scheduler.schedule()
        ended += len(scheduler.commit(spans, *results(spans, 0)[:1], 0))
    assert scheduler.preemptions > 0 and ended > 5000 and scheduler.in_flight == {}
    assert scheduler.pool.available == 150 and not any(scheduler.pool._references)
