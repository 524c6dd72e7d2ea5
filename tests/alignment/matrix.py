"""Every way to ask and every way to serve, so combined that each pair of choices meets in some request or some cell."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch

from kernels.collectives import TreeGroup
from kernels.model import ModelConfig, Parameter
from rollout.drafts.lookup import Lookup
from rollout.engine import Engine, EngineConfig
from rollout.sampling import Completion, Request, SamplingParams, Token
from rollout.scheduler import Limits
from tests.rollout.liars import Liar, speculate
from tests.trainer.batches import all_of_texts
from trainer.batch import Batch

Weights = Sequence[tuple[Parameter, torch.Tensor]]
NEW = 12
NEIGHBOURS = 1000  # their ids begin here


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows, one value of each factor in each, that contain every pair of values of two factors."""
    left = {
        ((f, i), (g, j))
        for f, g in combinations(factors, 2)
        for i in range(len(factors[f]))
        for j in range(len(factors[g]))
    }
    rows = []
    while left:
        row = dict(min(left))
        for name in factors:
            if name not in row:
                row[name] = max(range(len(factors[name])), key=lambda i: len(left & _pairs(row | {name: i}, factors)))
        left -= _pairs(row, factors)
        rows.append({name: factors[name][row[name]] for name in factors})
    return rows


def _pairs(row: Mapping[str, int], factors: Mapping[str, Sequence[Any]]) -> set:
    return {((f, row[f]), (g, row[g])) for f, g in combinations(factors, 2) if f in row and g in row}


def letters(ids: Sequence[int]) -> str:
    return "".join(chr(40 + i) for i in ids)


def asked(config: ModelConfig, lengths: Sequence[int], first: Callable[[Request], Completion]) -> list[Request]:
    """Requests over prompts of these lengths that share a start. `first`: the first sample of a request, served alone."""
    ids = np.random.default_rng(3).integers(0, config.vocab_size, max(lengths)).tolist()
    rows = pairwise(
        {
            "length": lengths,
            "n": (1, 3),
            "temperature": (1.0, 0.0, 0.7),
            "filters": ({}, {"top_p": 0.8}, {"top_k": 12, "top_p": 0.95, "min_p": 0.02}),
            "stop": (None, "text", "id"),
            "score_from": (None, 1, 2),
        }
    )
    out = []
    for i, row in enumerate(rows):
        prompt = (*ids[: row["length"] - 1], i % config.vocab_size)
        sampling = SamplingParams(NEW - i % 3, row["temperature"], 77 + i, n=row["n"], **row["filters"])
        request = Request(i, prompt, sampling, row["score_from"])
        said = first(request).token_ids
        ends = {"text": {"stop": (letters(said[5:7]),)}, "id": {"stop_ids": (said[6],)}}.get(row["stop"], {})
        out.append(replace(request, sampling=replace(sampling, **ends)))
    return out


@dataclass(frozen=True)
class Cell:
    """One way to serve."""

    chunk: int
    page_size: int
    cache: str  # "off", "cold", or "warm": all has been served before
    room: str  # "roomy", or "tight": pages for the longest request and one more
    company: str  # "none", or "comes and goes": others, of which every second is aborted
    how: str  # "launched", "overlapped", "graphs", or "tp N"
    drafts: str = "none"  # or the lie of a drafter (tests.rollout.liars), or "looked up"

    def __str__(self) -> str:
        sizes = f"chunk {self.chunk}, page {self.page_size}"
        return f"{sizes}, {self.cache}, {self.room}, {self.company}, {self.how}, drafts {self.drafts}"

    @property
    def size(self) -> int:
        return int(self.how.removeprefix("tp ")) if self.how.startswith("tp") else 1


@dataclass(frozen=True)
class Served:
    completions: list[Completion]  # of the requests that are compared
    told: list[Token]  # of them, as they were sampled
    aborted: int
    preemptions: int
    hit_tokens: int
    drafted: int


def serve(
    cell: Cell,
    config: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    device: str,
    requests: Sequence[Request],
    group: TreeGroup | None = None,
    truth: Sequence[Completion] = (),
) -> Served:
    """`truth`: what the requests will say, for drafters."""
    longest = max(len(r.prompt_ids) + r.sampling.max_new_tokens for r in requests)
    samples = sum(r.sampling.n for r in requests)
    pages = -(-longest // cell.page_size)
    pages = pages + 1 if cell.room == "tight" else pages * 3 * samples
    running = 3 if cell.room == "tight" else 2 * samples
    limits = Limits(running, max(2 * cell.chunk, running), cell.chunk)
    fast = cell.how in ("overlapped", "graphs")
    shape = (pages, cell.page_size, cell.cache != "off")
    graphs, drafts = cell.how == "graphs", "off" if cell.drafts == "none" else "auto"
    how = EngineConfig(*shape, limits, dtype, device, cuda_graphs=graphs, overlap=fast, speculate=drafts)
    engine = Engine(config, how, group, letters)
    if cell.drafts != "none":
        looked_up = cell.drafts == "looked up"
        speculate(engine, Lookup() if looked_up else Liar(cell.drafts, config.vocab_size, truth))
    for parameter, whole in weights:
        engine.runner.load(parameter, whole)
    engine.version = 0
    if cell.cache == "warm":
        engine.generate(requests)
    told: list[Token] = []
    engine.on_token = told.append
    before, hits = engine.scheduler.preemptions, engine.pool.hit_tokens
    others = neighbours(requests) if cell.company == "comes and goes" else []
    for request in (*others[::2], *requests, *others[1::2]):
        engine.add(request)
    victims = [r.id for r in others[::2]]
    done: list[Completion] = []
    aborted = 0
    while not engine.idle:
        done += engine.step()
        if victims:
            ended = engine.abort(victims.pop())
            aborted += len(ended)
            done += ended
    mine = sorted((c for c in done if c.request_id < NEIGHBOURS), key=lambda c: (c.request_id, c.sample))
    assert engine.pool.available == pages, "a page is not free at the end"
    return Served(
        mine,
        [t for t in told if t.request_id < NEIGHBOURS],
        aborted,
        engine.scheduler.preemptions - before,
        engine.pool.hit_tokens - hits,
        engine.drafts.drafted,
    )


def neighbours(requests: Sequence[Request]) -> list[Request]:
    """Half of them have the prompt of a request that is compared."""
    return [
        Request(
            NEIGHBOURS + i,
            r.prompt_ids if i % 2 else tuple(reversed(r.prompt_ids)),
            SamplingParams(1 + i % 9, 1.2, seed=i, n=1 + i % 2, top_p=0.9 if i % 3 else 1.0),
        )
        for i, r in enumerate(requests)
    ]


def as_batch(requests: Sequence[Request], completions: Sequence[Completion]) -> Batch:
    """What the trainer is given to say the same: of each sample all tokens but the first count."""
    by_id = {r.id: r for r in requests}
    pairs = [(by_id[c.request_id], c) for c in completions]
    return all_of_texts([(r.prompt_ids + c.token_ids, len(r.prompt_ids), r.sampling) for r, c in pairs])


def recorded(completions: Iterable[Completion]) -> list[torch.Tensor]:
    """Of each sample the log-probs of the prompt tokens that were asked for, and of all that were sampled."""
    return [torch.tensor((*c.prompt_logprobs, *c.logprobs)) for c in completions]
