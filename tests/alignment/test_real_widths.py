"""The promise at real widths, on a GPU: what the engine recorded while decoding is what the trainer computes, to the bit,
whatever the batch, company, chunk, page, cache and tensor-parallel size.

Two layers of Qwen3-0.6B and of Qwen3-8B with the whole vocabulary, random weights, bfloat16. One trainer pass is the
reference of every way of serving. It stands beside tests/rollout and tests/trainer because it is about neither alone.

Most of the time goes to compilation: a kernel is compiled for each number of heads of a rank, each page size and each power
of two of sequences, so the ways of serving share those where they can.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kernels.collectives import TreeGroup
from kernels.model import ModelConfig
from rollout.sampling import Completion, Request
from tests.alignment.ranks import serve, work
from tests.alignment.scenes import (
    SMALL,
    WIDTHS,
    assert_same_completions,
    batch_of,
    engine,
    requests,
    score,
    strangers,
    trainer_model,
    weights,
)
from tests.alignment.threads import run_threads
from tests.bits import assert_same_bits
from tests.collectives.processes import run_ranks
from trainer.batch import Batch
from trainer.loss import PolicyLoss
from trainer.trainer import Trainer, TrainerConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE = "cuda"
SERVED = {
    "all together": {},
    "one at a time": {"running": 1},
    "two at a time, chunks of 100, no cache": {"running": 2, "chunk": 100, "batch": 130, "prefix_cache": False},
    "two at a time, chunks of 33, pages of 64": {"running": 2, "chunk": 33, "page_size": 64, "pages": 64},
    "as CUDA graphs": {"graphs": True},
    "few pages": {"running": 3, "pages": 39},  # the longest request fits and little else: preemption
}


class Scene(NamedTuple):
    config: ModelConfig
    asked: list[Request]
    done: list[Completion]  # all together, on one rank
    batch: Batch


@pytest.fixture(scope="module", params=WIDTHS)
def scene(request: pytest.FixtureRequest) -> Scene:
    config = WIDTHS[request.param]
    asked = requests(config)
    done = engine(config, weights(config, DEVICE), DEVICE).generate(asked)
    return Scene(config, asked, done, batch_of(asked, done))


def test_the_trainer_computes_what_the_engine_recorded(scene: Scene) -> None:
    model = trainer_model(scene.config, weights(scene.config, DEVICE), DEVICE)
    recorded = torch.from_numpy(scene.batch.logprobs)
    assert recorded.isfinite().all() and len(recorded.unique()) > 50
    assert_same_bits(score(model, scene.batch), recorded, "log-probs of all sequences, packed")
    at = 0
    for i, n in enumerate(scene.batch.counts.tolist()):
        alone = scene.batch.take(i, i + 1)
        assert_same_bits(score(model, alone), recorded[at : at + n], f"log-probs of sequence {i} alone")
        at += n
    with torch.no_grad():
        model.layers[0].o[3, 5] += 4
    different = score(model, scene.batch) != recorded  # the comparison can fail
    assert different.float().mean() > 0.5


@pytest.mark.parametrize("how", SERVED)
def test_batch_chunks_pages_and_cache(scene: Scene, how: str) -> None:
    served = engine(scene.config, weights(scene.config, DEVICE), DEVICE, **SERVED[how])
    assert_same_completions(served.generate(scene.asked), scene.done, how)
    assert (served.scheduler.preemptions > 0) == (how == "few pages")
    if served.pool.prefix_cache:
        hits = served.pool.hit_tokens
        assert_same_completions(served.generate(scene.asked), scene.done, f"{how}, from the cache")
        assert served.pool.hit_tokens > hits


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "as CUDA graphs"])
def test_company(scene: Scene, graphs: bool) -> None:
    """Batches of 250 sequences down to 10, so that each kernel that a decode step may choose has its turn."""
    served = engine(scene.config, weights(scene.config, DEVICE), DEVICE, pages=1500, graphs=graphs)
    others = strangers(scene.config, 240)
    done = served.generate([*others[:120], *scene.asked, *others[120:]])
    assert_same_completions([c for c in done if c.request_id < 1000], scene.done, "among 240 others")


@pytest.mark.parametrize(
    ("scene", "size"), [("Qwen3-0.6B", 2), ("Qwen3-0.6B", 8), ("Qwen3-8B", 4), ("Qwen3-8B", 8)], indirect=["scene"]
)
def test_tensor_parallel(scene: Scene, size: int) -> None:
    """Ranks are threads of this process; the next test has real ones."""

    def rank(group: TreeGroup) -> list[Completion]:
        return serve(scene.config, DEVICE, group)

    for r, done in enumerate(run_threads(size, rank)):
        assert_same_completions(done, scene.done, f"rank {r} of {size}")


def test_tensor_parallel_processes() -> None:
    expected = serve(SMALL, DEVICE, TreeGroup())
    for r, done in enumerate(run_ranks(2, work, DEVICE)):
        assert_same_completions(done, expected, f"process {r} of 2")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE, (1,))
    dist.destroy_process_group()


def test_rounds_of_sampling_and_training(mesh: DeviceMesh) -> None:
    """The FSDP2 trainer itself, gradients and all: weights travel to the engine, the ratio is exactly 1, twice."""
    config, asked = SMALL, requests(SMALL)
    trainer = Trainer(config, TrainerConfig(5, 2, dtype=torch.bfloat16), mesh, weights(config, DEVICE))
    before = None
    for version, size in enumerate((1, 2)):
        held = [(p, whole.clone()) for p, whole in trainer.weights()]

        def rank(group: TreeGroup, held: list = held) -> list[Completion]:
            return engine(config, held, DEVICE, group, running=2, chunk=300).generate(asked)

        done = run_threads(size, rank)[0]
        batch = batch_of(asked, done, advantage=[1.0, -0.5][version])
        report = trainer.step(batch, PolicyLoss(), lr=1e-3)
        assert_same_bits(torch.from_numpy(report.logprobs), torch.from_numpy(batch.logprobs), f"version {version}")
        assert report.clip_fraction == 0
        assert before != done
        before = done
