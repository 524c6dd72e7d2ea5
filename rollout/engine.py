"""Serves requests: batches of them become completions, and weights are replaced in place between batches."""

import gc
import resource
import sys
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Literal

import torch

from kernels.collectives import TreeGroup
from kernels.gpu.card import choose_family, chosen_family
from kernels.model import ModelConfig, Parameter, Weight
from kernels.weights.digest import Leaves
from rollout.drafts.drafter import Drafter
from rollout.drafts.lookup import Lookup
from rollout.drafts.pace import Pace
from rollout.drafts.speculation import Counts, Speculation, Step
from rollout.keys import Pages, PageSize, PrefixCache, Speculate, check
from rollout.pages import PagePool
from rollout.runner import Launched, Runner, RunnerError
from rollout.sampling import Completion, Request, RequestError, Token
from rollout.scheduler import Limits, Scheduler
from rollout.sequence import Sequence
from rollout.text import Decode

InFlight = Literal["refuse", "finish", "abort", "resume"]
"""What becomes of the requests in flight when weights are replaced:

refuse  the load is an error (an engine that never has any in flight then)
finish  they run to their end with the old weights first
abort   they end where they are, as "abort"
resume  they keep their tokens and go on: the keys of all tokens are computed again with the new weights, so what follows is
        what the new weights say after that text; each token is tagged with the version that sampled it
"""


@dataclass(frozen=True)
class EngineConfig:
    """Says how one engine serves. Nothing here changes a bit of a completion."""

    pages: Pages
    page_size: PageSize
    prefix_cache: PrefixCache
    limits: Limits
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    cuda_graphs: bool = False  # decode steps as CUDA graphs, where the group's collectives can be captured
    overlap: bool = False  # a step is launched before the tokens of the one before it are read
    family: str = field(
        default_factory=chosen_family
    )  # of the kernels that a GPU runs; this process's own, if not said
    speculate: Speculate = "off"

    def __post_init__(self) -> None:
        check(self, RequestError)


class Engine:
    """Runs one rank of a tensor-parallel engine; `group` is the whole of it. Ranks are given the same requests in the same
    order and then need no coordinator: the schedule is a function of the requests, the samples meet in the collectives."""

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        group: TreeGroup | None = None,
        decode: Decode | None = None,
        drafters: Many[Drafter] | None = None,
    ) -> None:
        """`decode`: token ids to text, the same function on every rank; stop texts need it. `drafters`: who guesses, where
        the config speculates; None: what needs no model."""
        if config.device == "cuda":
            choose_family(config.family)
        self.config = config
        group = group or TreeGroup()
        graphs_of = config.limits.max_running if config.cuda_graphs and group.capturable else 0
        rows = config.limits.rows if config.speculate == "auto" else 0
        self.runner = Runner(model, group, config.pages, config.page_size, config.dtype, config.device, graphs_of, rows)
        self.pool = PagePool(config.pages, config.page_size, config.prefix_cache)
        self.scheduler = Scheduler(self.pool, config.limits, model.max_positions, decode)
        self.version = -1  # no weights yet
        self.on_token: Callable[[Token], None] = lambda token: None  # told of each token as it is sampled
        self._ended: list[Completion] = []  # outside a step: the next one hands them out
        self._flying: Launched | None = None  # a batch whose results have not been read
        self.speculation: Speculation | None = None
        if config.speculate == "auto":
            pace = Pace(config.limits.rows, self.runner.of_first_rank if group.shard.size > 1 else None)
            chosen = [Lookup()] if drafters is None else drafters
            self.speculation = Speculation(chosen, pace, model.vocab_size, config.overlap)
        self._unsaid: list[
            tuple[Sequence, int, int]
        ] = []  # whose last tokens, how many and of which version, are to be told
        self._captured = 0  # graphs when results were last taken

    @property
    def idle(self) -> bool:
        """Says whether nothing is in flight, and nothing to be handed out."""
        return self.scheduler.idle and not self._ended

    def load(self, weights: Iterable[tuple[Parameter, Weight]], version: int, in_flight: InFlight = "refuse") -> Leaves:
        """Replaces all weights, forgets cached prefixes, and returns the digests of the slices now held. Completions of
        requests that this ends are handed out by the next `step`."""
        self.pause(f"weights of version {version} arrived", in_flight)
        self.runner.weight_memory.regain()
        for parameter, whole in weights:
            self.runner.load(parameter, whole)
        self.version = version
        return self.runner.digests()

    def pause(self, why: str, in_flight: InFlight) -> None:
        """Drops all keys: none of any token is kept after this, and no request runs; those that are to resume wait."""
        if in_flight == "refuse" and not self.scheduler.idle:
            raise RequestError(f"{why} while requests are in flight")
        if in_flight == "finish":
            while not self.scheduler.idle:
                self._ended += self._batch()
        self._ended += self._settle()
        self._tell()
        if in_flight == "abort":
            for request_id in list(self.scheduler.in_flight):
                self._ended += self.abort(request_id)
        self.scheduler.restart()
        self.pool.clear()
        if self.speculation:
            self.speculation.paused()

    def _check_ready(self) -> None:
        if not self.awake:
            raise RequestError("the engine is asleep: wake it first")
        if self.version < 0:
            raise RequestError("the engine has no weights: load them first")

    @property
    def awake(self) -> bool:
        """Says whether the memory of pages and weights is held."""
        return self.runner.page_memory.held and self.runner.weight_memory.held

    def peak_bytes(self) -> int:
        """Returns the most memory that this rank had so far: weights, pages and tensors on its GPU; on a CPU, all of the
        process."""
        if self.config.device == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        held = self.runner.weight_memory.bytes + self.runner.page_memory.bytes
        return held + torch.cuda.max_memory_allocated()

    def sleep(self, level: Literal[1, 2], in_flight: InFlight = "refuse") -> None:
        """Gives the memory of keys and values back, at level 2 that of the weights too, which are then lost: after `wake` the
        engine has none until a `load`. Addresses stay, so CUDA graphs stay valid. An engine asleep takes requests and aborts;
        `step` is an error while there are any."""
        self.pause("the engine is to sleep", in_flight)
        self.runner.page_memory.release()
        if level == 2:
            self.runner.weight_memory.release()
            self.version = -1

    def wake(self) -> None:
        """Regains what `sleep` gave back. torch.OutOfMemoryError where there is too little; it can be tried again."""
        self.runner.weight_memory.regain()
        self.runner.page_memory.regain()

    def check(self, request: Request) -> None:
        """Raises RequestError if the request could never be served."""
        self.scheduler.check(request)
        vocab = self.runner.config.vocab_size
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab:
            raise RequestError(f"request {request.id}: a prompt id is outside the vocabulary of {vocab}")
        if request.top > vocab:
            raise RequestError(f"request {request.id}: top={request.top} is more than the vocabulary of {vocab}")

    def add(self, request: Request) -> None:
        """Queues a request; RequestError where it could never be served."""
        self.check(request)
        self.scheduler.add(request)

    def abort(self, request_id: int) -> list[Completion]:
        """Ends a request between two steps, in whatever state, and frees its pages; what its unfinished samples had come to. An
        id that is not in flight is that of a request that has ended: nothing happens."""
        return self.scheduler.abort(request_id, self.version)

    def forget(self) -> None:
        """Empties the prefix cache; pages in use stay with their owners. Changes no bit."""
        self.pool.clear()

    def step(self) -> list[Completion]:
        """Computes one batch. RunnerError, where the weights gave no number to sample from, drops every request in flight."""
        ended, self._ended = self._ended, []
        return ended if self.scheduler.idle else ended + self._batch()

    def _batch(self) -> list[Completion]:
        """Launches the next batch, then takes the results of the one before it; without overlap its own. Who drafts must know
        all tokens so far: then, and after a batch with guesses, the results of the one before come first."""
        self._check_ready()
        done = self._settle() if self._flying and self._flying.guesses else []
        guess = None
        if self.speculation and self.speculation.wants(len(self.scheduler.running)) and self.scheduler.decoding:
            done += self._settle()
            guess = self.speculation.guess
        before, spans = self._flying, self.scheduler.schedule(guess)
        self._flying = self.runner.launch(spans, before) if spans else None
        self._tell()
        if not self.config.overlap:
            before, self._flying = self._flying, None
        done += self._take(before) if before else []
        self._tell()
        return done

    def _settle(self) -> list[Completion]:
        """Waits for the batch whose results have not been read: what it finished."""
        flying, self._flying = self._flying, None
        return self._take(flying) if flying else []

    def _take(self, launched: Launched) -> list[Completion]:
        sequences = [s.sequence for s in launched.sampling if s.guess is None and not s.sequence.ended]
        before = [len(sequence.tokens) for sequence in sequences]
        try:
            sampled, scored = launched.results()
            done = self.scheduler.commit(launched.spans, sampled, self.version, scored)
        except RunnerError:
            self._flying = None
            self.scheduler.clear()
            self.pool.clear()  # the keys are no numbers either
            raise
        gained = [(sequence, len(sequence.tokens) - count) for sequence, count in zip(sequences, before, strict=True)]
        self._unsaid += [(*one, self.version) for one in gained]
        if self.speculation:
            self._measure(launched, gained)
        return done

    def _tell(self) -> None:
        """Tells of tokens that were taken. Not before the next batch is launched: a card waits for nobody's ears."""
        unsaid, self._unsaid = self._unsaid, []
        for sequence, count, version in unsaid:
            for token in sequence.last(count, version):
                self.on_token(token)

    def _measure(self, launched: Launched, gained: list[tuple[Sequence, int]]) -> None:
        assert self.speculation
        guesses = sum(s.guess is not None for s in launched.sampling)
        graphs = len(self.runner.graphs.graphs) if self.runner.graphs else 0
        captured, self._captured = graphs > self._captured, graphs
        self.speculation.taken(Step(launched.decodes, guesses, len(launched.spans), gained, captured))
        if self.scheduler.idle:
            self.speculation.paused()

    @property
    def drafts(self) -> Counts:
        """Returns what became of drafted tokens since the engine began."""
        return self.speculation.counts if self.speculation else Counts()

    def advance(self, requests: Iterable[Request], steps: int) -> list[Completion]:
        """Queues requests and does up to `steps` steps, fewer where nothing is left to do; returns what ended. Ranks that are
        told the same at every call stay in step, however much time lies between two."""
        for request in requests:
            self.add(request)
        done: list[Completion] = []
        for _ in range(steps):
            if self.idle:
                break
            done += self.step()
        return done

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Serves all of them to the end, in the order of the requests, the samples of each side by side; none of them if one is
        refused."""
        requests = list(requests)
        ids: set[int] = set()
        for request in requests:
            self.check(request)
            if request.id in ids:
                raise RequestError(f"request {request.id}: two requests have this id")
            ids.add(request.id)
        self._check_ready()
        for request in requests:
            self.scheduler.add(request)
        done: dict[tuple[int, int], Completion] = {}
        while not self.idle:
            for completion in self.step():
                done[completion.request_id, completion.sample] = completion
        return [done[request.id, sample] for request in requests for sample in range(request.sampling.n)]


def freeze_heap() -> None:
    """Freezes the heap of a process whose engine is ready and stays: what is there now is not garbage collected any more.
    With torch and transformers imported a full collection takes 100 ms, in which a card has done with the steps it was
    given."""
    gc.collect()
    gc.freeze()
