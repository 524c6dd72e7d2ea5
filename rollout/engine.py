"""The engine: requests in, completions out, weights replaced in place between batches."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kernels.collectives import TreeGroup
from kernels.model import ModelConfig
from kernels.model.weights import Leaves, Parameter
from rollout.pages import PagePool
from rollout.runner import Runner, RunnerError
from rollout.sampling import Completion, Request, RequestError
from rollout.scheduler import Limits, Scheduler


@dataclass(frozen=True)
class EngineConfig:
    """How one engine serves. Nothing here changes a bit of a completion."""

    pages: int
    page_size: int
    prefix_cache: bool
    limits: Limits
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    cuda_graphs: bool = False  # decode steps as CUDA graphs, where the group's collectives can be captured


class Engine:
    """One rank of a tensor-parallel engine; `group` is the whole of it. Ranks are given the same requests in the same order
    and then need no coordinator: the schedule is a function of the requests, the samples meet in the collectives."""

    def __init__(self, model: ModelConfig, config: EngineConfig, group: TreeGroup | None = None) -> None:
        self.config = config
        group = group or TreeGroup()
        graphs_of = config.limits.max_running if config.cuda_graphs and group.capturable else 0
        self.runner = Runner(model, group, config.pages, config.page_size, config.dtype, config.device, graphs_of)
        self.pool = PagePool(config.pages, config.page_size, config.prefix_cache)
        self.scheduler = Scheduler(self.pool, config.limits, model.max_positions)
        self.version = -1  # no weights yet

    def load(self, weights: Iterable[tuple[Parameter, torch.Tensor]], version: int) -> Leaves:
        """Replaces all weights, forgets cached prefixes, and returns the digests of the slices now held."""
        if not self.scheduler.idle:
            raise RequestError(f"weights of version {version} arrived while requests are in flight")
        for parameter, whole in weights:
            self.runner.load(parameter, whole)
        self.pool.clear()
        self.version = version
        return self.runner.digests()

    def check(self, request: Request) -> None:
        """Raises RequestError if the request could never be served."""
        vocab = self.runner.config.vocab_size
        if request.prompt_ids and not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab:
            raise RequestError(f"request {request.id}: a prompt id is outside the vocabulary of {vocab}")
        self.scheduler.check(request)

    def add(self, request: Request) -> None:
        self.check(request)
        self.scheduler.add(request)

    def step(self) -> list[Completion]:
        """One batch. RunnerError, where the weights gave no number to sample from, drops every request in flight."""
        spans = self.scheduler.schedule()
        try:
            sampled = self.runner.run(spans)
        except RunnerError:
            self.scheduler.clear()
            raise
        return self.scheduler.commit(spans, sampled, self.version)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """All of them to the end, in the order of the requests; none of them if one is refused."""
        requests = list(requests)
        ids: set[int] = set()
        for request in requests:
            self.check(request)
            if request.id in ids:
                raise RequestError(f"request {request.id}: two requests have this id")
            ids.add(request.id)
        for request in requests:
            self.scheduler.add(request)
        done: dict[int, Completion] = {}
        while not self.scheduler.idle:
            for completion in self.step():
                done[completion.request_id] = completion
        return [done[request.id] for request in requests]
