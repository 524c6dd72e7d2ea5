"""What Prometheus may scrape. Measured where it happens: in the engine's thread."""

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rollout.loop import EngineLoop
from rollout.sampling import Completion, Request

_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SLOW = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)


class Metrics:
    """Counts and times what the engine does, for Prometheus."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(f"samebit_{name}", text, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"samebit_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"samebit_{name}", text, registry=registry, buckets=buckets)

        self.requests = counter("requests", "HTTP calls that were admitted")
        self.refused = counter("refused", "HTTP calls refused for load")
        self.aborted = counter("aborted", "HTTP calls given up: client gone, too late, shutdown")
        self.samples = Counter("samebit_samples", "samples ended", ["reason"], registry=registry)
        self.prompt_tokens = counter("prompt_tokens", "prompt tokens of requests that were admitted")
        self.sampled_tokens = counter("sampled_tokens", "tokens sampled")
        self.computed_tokens = gauge("computed_tokens", "tokens computed since the start, prompts and sampled")
        self.hit_tokens = gauge("cache_hit_tokens", "tokens taken from the prefix cache since the start")
        self.waiting = gauge("waiting", "samples that wait")
        self.running = gauge("running", "samples that run")
        self.preemptions = gauge("preemptions", "preemptions since the start")
        self.pages_free = gauge("pages_free", "key-value pages that can be handed out")
        self.pages = gauge("pages", "key-value pages")
        self.drafted = gauge("drafted_tokens", "drafted tokens that were checked since the start")
        self.accepted = gauge("accepted_tokens", "drafted tokens that were right since the start")
        self.drawn_each = gauge("drafted_step_tokens", "tokens that a sample gains in a step with drafts, on the mean")
        self.saved = gauge("drafts_saved_seconds", "seconds that drafts have saved since the start, estimated")
        self.first = histogram("time_to_first_token_seconds", "from admission to the first token", _SLOW)
        self.between = histogram("inter_token_seconds", "between two tokens of a sample", _FAST)
        self.steps = histogram("step_seconds", "one batch", _FAST)
        self._last: dict[tuple[int, int], float] = {}
        self._admitted: dict[int, float] = {}

    def admitted(self, requests: Sequence[Request]) -> None:
        """Notes when requests came; called in the event loop's thread, before the engine hears of them."""
        self.requests.inc()
        for request in requests:
            self._admitted[request.id] = time.monotonic()
            self.prompt_tokens.inc(len(request.prompt_ids))

    def token(self, request_id: int, sample: int) -> None:
        """Counts a token, and observes the time since the one before it or since the request was admitted."""
        now = time.monotonic()
        self.sampled_tokens.inc()
        last = self._last.get((request_id, sample))
        if last is not None:
            self.between.observe(now - last)
        elif (begin := self._admitted.get(request_id)) is not None:
            self.first.observe(now - begin)
        self._last[request_id, sample] = now

    def completion(self, completion: Completion) -> None:
        """Counts a sample by the reason that ended it."""
        self.samples.labels(completion.finish_reason).inc()
        self._last.pop((completion.request_id, completion.sample), None)

    def forget(self, requests: Sequence[Request]) -> None:
        """Forgets the times of requests that are over."""
        for request in requests:
            self._admitted.pop(request.id, None)
            for sample in range(request.sampling.n):
                self._last.pop((request.id, sample), None)

    def step(self, seconds: float, loop: EngineLoop) -> None:
        """Observes a step's seconds and the state after it."""
        self.steps.observe(seconds)
        self.state(loop)

    def state(self, loop: EngineLoop) -> None:
        """Copies the engine's counters and the fill of its queues and pages."""
        engine = loop.ranks.engine
        self.computed_tokens.set(engine.scheduler.computed_tokens)
        self.hit_tokens.set(engine.pool.hit_tokens)
        self.waiting.set(len(engine.scheduler.waiting))
        self.running.set(len(engine.scheduler.running))
        self.preemptions.set(engine.scheduler.preemptions)
        drafts = engine.drafts
        self.drafted.set(drafts.drafted)
        self.accepted.set(drafts.accepted)
        self.drawn_each.set(drafts.tokens / max(drafts.draws, 1))
        self.saved.set(drafts.seconds_saved)
        self.pages_free.set(engine.pool.available)
        self.pages.set(engine.pool.pages)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return bytes(generate_latest(self.registry))
