"""The matrix: the tokens and log-probs of a request are the same bits however it is served, and they are the trainer's.

Requests combine prompt, n, temperature, filters, stops and prompt log-probs; cells combine chunks, pages, the prefix cache,
preemption, company that comes and goes, drafters that lie, and tensor parallelism, overlap or CUDA graphs. On a CPU with tiny
models, on a GPU with two layers of Qwen3-8B's and of Qwen3-30B-A3B's widths.
"""

from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product
from typing import NamedTuple

import pytest
import torch

from kernels.collectives import TreeGroup
from kernels.model import ModelConfig
from rollout.sampling import Completion, Request
from tests.alignment.matrix import Cell, Served, Weights, as_batch, asked, pairwise, recorded, serve
from tests.alignment.scenes import EXPERTS, LARGE, score, trainer_model, weights
from tests.alignment.threads import run_threads
from tests.bits import assert_same_bits
from tests.model.shapes import EIGHT, FP8, SHAPES, random_weights
from tests.rollout.scenarios import bits
from tests.trainer.batches import plain_model

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ALONE = Cell(10**4, 16, "off", "roomy", "none", "launched")
COMMON = {
    "cache": ("off", "cold", "warm"),
    "room": ("roomy", "tight"),
    "company": ("none", "comes and goes"),
    "drafts": ("none", "half", "too long", "stops"),
}
ON_CPU = {"chunk": (64, 3, 17), "page_size": (8, 1, 5), **COMMON, "how": ("launched", "overlapped", "tp 2", "tp 4")}
ON_GPU = {"chunk": (8192, 33), "page_size": (16, 64), **COMMON, "how": ("launched", "overlapped", "graphs", "tp 2")}
MODELS = {
    "cpu": EIGHT,
    "cpu, experts": SHAPES["experts, dense layers"],
    "cpu, fp8_block": replace(FP8, hidden_size=512, intermediate_size=512, heads=4, kv_heads=4, leaves=4),
    "cuda": LARGE,
    "cuda, experts": EXPERTS,
}
SCENES = [pytest.param(name, marks=gpu if name.startswith("cuda") else ()) for name in MODELS]
CELLS = [
    pytest.param(*scene.values, Cell(**row), id=f"{scene.values[0]}: {Cell(**row)}", marks=scene.marks)
    for scene in SCENES
    for row in pairwise(ON_GPU if scene.marks else ON_CPU)
]


class Scene(NamedTuple):
    config: ModelConfig
    weights: Weights
    dtype: torch.dtype
    device: str
    requests: list[Request]
    alone: list[Completion]  # each request in an engine of its own

    def serve(self, cell: Cell, requests: list[Request] | None = None, group: TreeGroup | None = None) -> Served:
        where = self.dtype, self.device, requests or self.requests, group
        return serve(cell, self.config, self.weights, *where, self.alone)


@pytest.fixture(params=SCENES)
def scene(request: pytest.FixtureRequest) -> Scene:
    return made(request.param)


@lru_cache(maxsize=2)
def made(name: str) -> Scene:
    config, device = MODELS[name], name.partition(",")[0]
    if device == "cpu":
        dtype = torch.float32 if config.format == "plain" else torch.bfloat16
        empty = Scene(config, list(random_weights(config)), dtype, device, [], [])
    else:
        empty = Scene(config, list(weights(config, device)), torch.bfloat16, device, [], [])
    lengths = (3, 17, 70) if device == "cpu" else (3, 65, 520)
    requests = asked(empty.config, lengths, lambda r: empty.serve(ALONE, [r]).completions[0])
    alone = [c for r in requests for c in empty.serve(ALONE, [r]).completions]
    return empty._replace(requests=requests, alone=alone)


def test_pairwise_has_every_pair() -> None:
    factors = {"a": (1, 2), "b": "xyz", "c": (True, False), "d": range(4)}
    rows = pairwise(factors)
    for f, g in combinations(factors, 2):
        assert {(r[f], r[g]) for r in rows} == set(product(factors[f], factors[g]))
    assert len(rows) < 18


def test_the_requests_say_something(scene: Scene) -> None:
    reasons = [c.finish_reason for c in scene.alone]
    matched = {type(c.matched) for c in scene.alone if c.finish_reason == "stop"}
    assert reasons.count("stop") > 3 and reasons.count("length") > 3 and matched == {int, str}
    assert len({c.token_ids for c in scene.alone}) > len(scene.requests)
    assert any(c.prompt_logprobs for c in scene.alone) and any(r.sampling.truncated for r in scene.requests)


def test_the_trainer_says_the_same(scene: Scene) -> None:
    if scene.device == "cpu":
        model = plain_model(scene.config, {p.name: w for p, w in scene.weights}, scene.dtype)
    else:
        model = trainer_model(scene.config, scene.weights, scene.device)
    batch = as_batch(scene.requests, scene.alone)
    trained = score(model, batch).split(batch.counts.tolist())
    for mine, theirs, done in zip(recorded(scene.alone), trained, scene.alone, strict=True):
        assert_same_bits(theirs[-len(mine) :], mine, f"request {done.request_id}, sample {done.sample}")


@pytest.mark.parametrize(("scene", "cell"), CELLS, indirect=["scene"])
def test_cell(scene: Scene, cell: Cell) -> None:
    ranks = (
        run_threads(cell.size, lambda group: scene.serve(cell, group=group)) if cell.size > 1 else [scene.serve(cell)]
    )
    for served in ranks:
        assert bits(served.completions) == bits(scene.alone) and served.completions == scene.alone
        for done in served.completions:
            mine = [t for t in served.told if (t.request_id, t.sample) == (done.request_id, done.sample)]
            assert [(t.id, t.logprob) for t in mine] == list(zip(done.token_ids, done.logprobs, strict=True))
        assert (served.aborted > 0) == (cell.company == "comes and goes")
        assert (served.hit_tokens > 0) >= (cell.cache == "warm" and cell.room == "roomy")
        assert (served.preemptions > 0) == (cell.room == "tight")
        assert (served.drafted > 0) == (cell.drafts != "none")
