"""Decides what runs next: continuous batching with chunked prefill and preemption, first come first served. Pure Python.

The plan decides speed and nothing else: no bit of any completion depends on it. It is itself a pure function of the
requests and of the tokens committed so far, so the ranks of a tensor-parallel engine each compute it and agree without talking.

It needs counts, not values: a step may be planned before the tokens that the step before it samples are known. A sequence whose
pending token then turns out to end it has one token more in flight, which is dropped; its pages are free at once, since
whatever takes them is launched later. Drafted tokens are planned as if all were right; `commit` takes those that are.

Sequences with a common prefix that are admitted together compute it once: the later ones run without pages until the first has
computed the pages that they share, and then find them in the cache. They wait for an older sequence only, and the oldest always
advances, so nobody waits for ever.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from rollout.keys import MaxBatchTokens, MaxRunning, PrefillChunk, check
from rollout.pages import PagePool
from rollout.sampling import Completion, Request, RequestError, Top
from rollout.sequence import Sequence, Span
from rollout.text import Decode, TextStream


@dataclass(frozen=True)
class Limits:
    """Bounds what runs at once; none of these changes a bit of the output."""

    max_running: MaxRunning
    max_batch_tokens: MaxBatchTokens
    prefill_chunk: PrefillChunk

    def __post_init__(self) -> None:
        check(self, RequestError)

    @property
    def rows(self) -> int:
        """Bounds the rows of a decoding step: sequences, and where these are few also drafted tokens of theirs."""
        drafted = min(MOST_ROWS, self.max_batch_tokens, (1 + MOST_DRAFTED) * self.max_running)
        return max(self.max_running, drafted)


MOST_DRAFTED = 15
"""Drafted tokens of a sequence in one step."""

MOST_ROWS = 256
"""Rows of a decoding step with drafted tokens: with more a card is busy computing, and a row is not cheap any more."""

Guess = Callable[[Many[Span], int], Many[Many[int]]]
"""(The spans of a step in which every sequence decodes, the rows that may join them) -> drafted tokens after each span."""


class Scheduler:
    """Plans the steps of one engine: which sequences compute which positions next, in which pages."""

    def __init__(self, pool: PagePool, limits: Limits, max_positions: int, decode: Decode | None = None) -> None:
        """`decode`: where the tokens are known to be text; stop texts need it."""
        self.pool, self.limits, self.max_positions, self.decode = pool, limits, max_positions, decode
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.in_flight: dict[int, int] = {}  # samples left of each request, waiting or running
        self.preemptions = 0
        self.computed_tokens = 0
        self._computing: dict[int, Sequence] = {}  # name of a page -> the oldest sequence that has yet to compute it

    def check(self, request: Request) -> None:
        """Raises RequestError if the request could never be served."""
        if request.id in self.in_flight:
            raise RequestError(f"request {request.id}: a request with this id is already in flight")
        if not request.prompt_ids:
            raise RequestError(f"request {request.id}: the prompt is empty")
        if request.sampling.stop and self.decode is None:
            raise RequestError(f"request {request.id}: stop texts need a tokenizer, and this engine has none")
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
        """Adds a request: all samples of it, side by side."""
        self.check(request)
        self.in_flight[request.id] = request.sampling.n
        chain = self._chain(request.prompt_ids) if self.pool.prefix_cache else []
        for sample in range(request.sampling.n):
            text = TextStream(self.decode, request.sampling.stop) if self.decode and request.sampling.stop else None
            self.waiting.append(Sequence(request, list(request.prompt_ids), sample, text, chain=chain))

    @property
    def idle(self) -> bool:
        """Says whether no sequence runs or waits."""
        return not self.running and not self.waiting

    @property
    def decoding(self) -> bool:
        """Says whether the sequences that run do nothing but decode, and none is to be admitted."""
        if self.waiting and len(self.running) < self.limits.max_running:
            return False
        return all(s.pages and s.samples and s.computed >= s.length - 1 for s in self.running)

    def abort(self, request_id: int, version: int) -> list[Completion]:
        """Ends what is left of a request, in whatever state, and frees its pages at once. Unknown ids are of requests that have
        ended: nothing to do."""
        if request_id not in self.in_flight:
            return []
        left = [s for s in (*self.running, *self.waiting) if s.request.id == request_id]
        del self.in_flight[request_id]
        for sequence in left:
            sequence.ended = True
            self._drop(sequence)
        self._forget_ended()
        return [s.completion("abort", version) for s in sorted(left, key=lambda s: s.sample)]

    def clear(self) -> None:
        """Drops every request in flight."""
        for sequence in (*self.running, *self.waiting):
            sequence.ended = True
            self._drop(sequence)
        self.running.clear()
        self.waiting.clear()
        self.in_flight.clear()

    def restart(self) -> None:
        """Begins again under changed weights, with nothing pending: every sequence goes on from the tokens it has, whose keys
        will be computed again. Prompt log-probs that are not complete begin again, so that all are of one version."""
        for sequence in reversed(self.running):
            self._drop(sequence)
            self.waiting.appendleft(sequence)
        self.running.clear()
        for sequence in self.waiting:
            if not sequence.sampled:
                sequence.forget_scores()

    def schedule(self, guess: Guess | None = None) -> list[Span]:
        """Returns the next batch, which is then taken for launched; not empty unless idle, or all that is left is pending.
        Running sequences go first, in order of arrival. `guess`, which must not be given while anything is pending, is asked
        for drafted tokens where the batch decodes and nothing else; it must then be committed before the next is planned."""
        spans: list[Span] = []
        budget = self.limits.max_batch_tokens
        self._computing = {}
        for sequence in list(self.running):
            if budget == 0:
                break
            go = sequence.running and not sequence.complete  # not running: preempted by an older one
            span = self._extend(sequence, budget) if go else None
            if span:
                spans.append(span)
                budget -= span.stop - span.start
        begun = 0  # tokens of sequences that this batch admits
        while self.waiting and budget and len(self.running) < self.limits.max_running:
            sequence = self.waiting[0]
            if sequence.complete:
                break  # preempted; its pending token ends it
            if 2 * begun >= self.limits.max_batch_tokens and budget < min(sequence.length, self.limits.prefill_chunk):
                break  # rather whole in the next batch, where its attention needs no page, than cut
            if not self._held(sequence):
                span = self._admit(sequence, budget)
                if span is None:
                    break
                spans.append(span)
                budget -= span.stop - span.start
                begun += span.stop - span.start
            sequence.running = True
            self.running.append(self.waiting.popleft())
        room = min(budget, self.limits.rows - len(spans))
        if guess and room > 0 and spans and all(span.decodes for span in spans):
            spans = self._with_guesses(spans, guess(spans, room), room)
        for span in spans:
            self._launched(span)
        return spans

    def _with_guesses(self, spans: list[Span], drafted: Many[Many[int]], room: int) -> list[Span]:
        """Puts after each span its drafted tokens: no more than may follow it, and than there are rows and pages for."""
        out = []
        for span, tokens in zip(spans, drafted, strict=True):
            out.append(span)
            sequence, place, size = span.sequence, span.stop, self.pool.page_size
            count = min(len(tokens), sequence.most - place - 1, room)
            missing = self.pool.needed(place + count) - len(sequence.pages)
            if missing > 0:
                fresh = self.pool.take(missing)
                if fresh is None:
                    count = min(count, len(sequence.pages) * size - place)
                else:
                    sequence.pages += fresh
            out += [Span.of_guess(sequence, place + i, token) for i, token in enumerate(tokens[:count])]
            room -= count
        return out

    def commit(
        self,
        spans: list[Span],
        sampled: Many[tuple[int, float, Top] | None],
        version: int,
        scored: Many[Many[tuple[float, Top]]] = (),
    ) -> list[Completion]:
        """Takes the result of the oldest batch that is launched: one (token, log-prob, most likely ones) for each span that
        samples, None where a guess up to it was wrong, and for each span that scores (log-prob, most likely ones) of those
        prompt tokens; returns what finished. Pages that held nothing but wrong guesses are free then."""
        results, scores = iter(sampled), iter(scored)
        finished = []
        for span in spans:
            sequence = span.sequence
            self.computed_tokens += span.stop - span.start
            given = next(scores) if span.scored else ()
            sampled_here = next(results) if span.samples else None
            if sequence.ended:
                continue
            sequence.take_scores(given)
            sequence.pending -= span.samples
            if sampled_here is not None:
                if span.guess is not None:
                    sequence.computed = span.stop
                sequence.append(*sampled_here, version)
                self._publish(sequence)
            elif sequence.samples or span.stop < sequence.prompt:
                continue
            if reason := sequence.finish_reason():
                sequence.ended = True
                self._drop(sequence)
                self._count_down(sequence.request.id)
                finished.append(sequence.completion(reason, version))
        for span in spans:
            if span.guess is not None and not span.sequence.ended:
                self._cut(span.sequence)
        if finished:
            self._forget_ended()
        return finished

    def _cut(self, sequence: Sequence) -> None:
        """Frees the pages after what is computed."""
        needed = self.pool.needed(sequence.computed)
        if needed < len(sequence.pages):
            self.pool.release(sequence.pages[needed:])
            sequence.pages = sequence.pages[:needed]

    def _forget_ended(self) -> None:
        self.running = [s for s in self.running if not s.ended]
        if any(s.ended for s in self.waiting):
            self.waiting = deque(s for s in self.waiting if not s.ended)

    def _launched(self, span: Span) -> None:
        sequence = span.sequence
        if span.guess is not None:
            sequence.pending += 1
            return
        sequence.computed = span.stop
        sequence.pending += span.samples
        sequence.scoring += len(span.scored)
        self._publish(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Tells the cache of pages that are full of known tokens."""
        size = self.pool.page_size
        if sequence.computed // size > sequence.published // size:
            known = min(sequence.computed, len(sequence.tokens))
            self.pool.publish(sequence.tokens[:known], sequence.pages, sequence.path)
            sequence.published = known

    def _count_down(self, request_id: int) -> None:
        self.in_flight[request_id] -= 1
        if not self.in_flight[request_id]:
            del self.in_flight[request_id]

    def _stop(self, sequence: Sequence, budget: int) -> int:
        stop = len(sequence.tokens) + sequence.pending
        most = sequence.computed + min(budget, self.limits.prefill_chunk)
        return stop if stop < most else most

    def _admit(self, sequence: Sequence, budget: int) -> Span | None:
        """A sequence without pages takes what is cached and the pages of its first chunk, or nothing."""
        sequence.pages = self.pool.match(sequence.tokens[: sequence.reusable], sequence.path)
        sequence.computed = sequence.published = len(sequence.pages) * self.pool.page_size
        stop = self._stop(sequence, budget)
        fresh = self.pool.take(self.pool.needed(stop) - len(sequence.pages))
        if fresh is None:
            self.pool.release(sequence.pages)
            sequence.pages, sequence.computed, sequence.published = [], 0, 0
            return None
        sequence.pages += fresh
        if sequence.cached is None:
            sequence.cached = sequence.computed
        return self._planned(Span.plan(sequence, stop))

    def _extend(self, sequence: Sequence, budget: int) -> Span | None:
        """Pages for the next tokens of a running sequence, taken from the youngest where none are free."""
        if not sequence.pages and self._held(sequence):
            return None
        while True:
            if sequence.pages:
                stop = self._stop(sequence, budget)
                missing = self.pool.needed(stop) - len(sequence.pages)
                fresh = self.pool.take(missing) if missing else []
                if fresh is not None:
                    sequence.pages += fresh
                    return self._planned(Span.plan(sequence, stop))
            elif span := self._admit(sequence, budget):
                return span
            youngest = self.running.pop()
            self._drop(youngest)
            self.waiting.appendleft(youngest)
            self.preemptions += 1
            if youngest is sequence:
                return None

    def _planned(self, span: Span) -> Span:
        """Notes the pages that a sequence has yet to compute, for those that come after it."""
        size = self.pool.page_size
        if span.start < span.sequence.prompt:
            for name in span.sequence.chain[span.start // size :]:
                self._computing.setdefault(name, span.sequence)
        return span

    def _held(self, sequence: Sequence) -> bool:
        """Whether an older sequence is about to compute pages that this one can use."""
        ahead, size = sequence.ahead, self.pool.page_size
        if ahead and ahead.running and ahead.pages and ahead.computed < sequence.until:
            return True
        sequence.ahead = None
        for place in range((sequence.reusable - 1) // size - 1, -1, -1):
            other = self._computing.get(sequence.chain[place]) if place < len(sequence.chain) else None
            if other:
                sequence.ahead, sequence.until = other, (place + 1) * size
                return True
        return False

    def _chain(self, prompt_ids: tuple[int, ...]) -> list[int]:
        """Equal names for equal prefixes of whole pages. Two that collide cost a wait and no bit."""
        size, name, names = self.pool.page_size, 0, []
        for place in range(0, len(prompt_ids) - size + 1, size):
            name = hash((name, prompt_ids[place : place + size]))
            names.append(name)
        return names

    def _drop(self, sequence: Sequence) -> None:
        """Frees the pages; the tokens and their recorded log-probs stay, and the keys will be computed again."""
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.published = [], 0, 0
        sequence.running, sequence.ahead = False, None
