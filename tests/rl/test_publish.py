"""A publication over real processes: what fails in the middle leaves every engine with the weights it had."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from kernels.model import Weight
from kernels.ops import Quantized
from rl.cluster import RolloutFleet, TrainerFleet, cluster
from rl.compose import check
from rl.errors import RunError
from rl.handover import Handover
from rl.model import model_config
from rl.publish import check_served, publish
from rollout.sampling import Request, SamplingParams
from tests.rl.command import SHORT
from tests.rl.faults import break_in
from tests.trainer.batches import random_batch
from trainer.loss import LikelihoodLoss

pytestmark = pytest.mark.slow

Fleets = tuple[RolloutFleet, TrainerFleet]
HALF = 1 << 15  # many small buckets
ASKED = [Request(i, (1 + i, 2, 3), SamplingParams(6, seed=i)) for i in range(6)]
LAYOUT = ("rollout.tp=2", "rollout.replicas=2", "rollout.max_new_tokens=6", "trainer.world_size=2")


SHAPES = {
    "plain": ("model.hf.num_hidden_layers=1",),
    "fp8_block": (
        *("model.format=fp8_block", "model.leaves=2", "model.hf.num_hidden_layers=1", "model.hf.hidden_size=256"),
        *("model.hf.intermediate_size=256", "model.hf.num_attention_heads=4", "model.hf.num_key_value_heads=4"),
        "model.hf.head_dim=64",
    ),
}


@pytest.fixture(
    scope="module",
    params=[("cpu", "plain"), ("cpu", "fp8_block"), pytest.param(("cuda", "plain"), marks=pytest.mark.gpu)],
    ids=" ".join,
)
def fleets(request: pytest.FixtureRequest) -> Iterator[Fleets]:
    """Two engines of two ranks, two trainer ranks; on a GPU they share the cards there are."""
    device, shape = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = check([*SHORT, *LAYOUT, *SHAPES[shape], f"device={device}", "out_dir=unused"])[0]
    with cluster(config, model_config(config, 64)) as started:
        publish(started[1], started[0], 1, half=HALF)
        started[0].wake()
        yield started


def train(trainer: TrainerFleet, model: Any) -> None:
    """Other weights."""
    trainer.step(random_batch(model, 256, longest=6), LikelihoodLoss(), 1e-2)


def served(rollout: RolloutFleet) -> list[tuple]:
    return [(c.token_ids, c.logprobs, c.version) for c in rollout.generate(ASKED)]


def test_every_layout_of_buckets_is_one_publication(fleets: Fleets) -> None:
    rollout, trainer = fleets
    before, shown = served(rollout), []
    first = publish(trainer, rollout, 1, lambda done, of: shown.append((done, of)))
    assert shown == [(i, shown[0][1]) for i in range(shown[0][1] + 1)]
    assert first == publish(trainer, rollout, 1, half=HALF) and served(rollout) == before
    train(trainer, rollout.model)
    assert publish(trainer, rollout, 2, half=HALF) != first
    after = served(rollout)
    assert after != before and {version for *_, version in after} == {2}


@pytest.mark.parametrize("asleep", [False, True])
def test_one_bit_is_seen_and_not_served(fleets: Fleets, asleep: bool) -> None:
    rollout, trainer = fleets
    publish(trainer, rollout, 3, half=HALF)
    before = served(rollout)
    train(trainer, rollout.model)
    if asleep:
        rollout.sleep(2)
    corrupt(rollout.engines[1][1].actor, "layers.0.down")
    with pytest.raises(
        RunError, match=r"engine 1 rank 1 received other weights .* version 4: layers.0.down .* not served"
    ):
        publish(trainer, rollout, 4, half=HALF)
    if asleep:
        rollout.wake()
        with pytest.raises(Exception, match="no weights"):
            served(rollout)
    else:
        assert served(rollout) == before
    publish(trainer, rollout, 4, half=HALF)
    assert {version for *_, version in served(rollout)} == {4}


def flip(held: Weight) -> None:
    """The lowest bit of one element."""
    bits = (held.values if isinstance(held, Quantized) else held).view(-1)
    bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[bits.itemsize])[77] ^= 1


def corrupt(actor: Any, name: str) -> None:
    """The lowest bit of an element of what it receives flips, once."""

    def install(rank: Any) -> None:
        receiver, real = rank.receiver, rank.receiver.received

        def other() -> list[int]:
            receiver.received = real
            flip(receiver._arrival.weights[name])
            return real()

        receiver.received = other

    ray.get(actor.__ray_call__.remote(install))


@pytest.mark.parametrize("where", ["at the commit", "in the rounding", "before an evaluation"])
def test_what_is_served_is_what_the_trainer_serves(fleets: Fleets, where: str) -> None:
    """One bit that flips outside what travels: the run stops with the parameter's name, and nothing samples from it."""
    rollout, trainer = fleets
    publish(trainer, rollout, 9, half=HALF)
    before = served(rollout)
    train(trainer, rollout.model)
    name = "layers.0.down"
    if where == "in the rounding":
        ray.get(trainer.ranks[0].actor.__ray_call__.remote(round_otherwise))
        with pytest.raises(RunError, match=r"received other weights .* version 10: \S+ \(fingerprint"):
            publish(trainer, rollout, 10, half=HALF)
        assert served(rollout) == before
    else:
        message = rf"rollout engine 0 rank 1 serves other weights than the trainer: {name} \(fingerprint"
        if where == "at the commit":
            spoil(rollout.engines[0][1].actor, name, after_commit=True)
            with pytest.raises(RunError, match=message):
                publish(trainer, rollout, 10, half=HALF)
        else:
            publish(trainer, rollout, 10, half=HALF)
            check_served(rollout)
            spoil(rollout.engines[0][1].actor, name, after_commit=False)
            with pytest.raises(RunError, match=message):
                check_served(rollout)
        with pytest.raises(Exception, match="no weights"):
            served(rollout)
        with pytest.raises(RunError, match="no weights yet"):
            check_served(rollout)
    publish(trainer, rollout, 10, half=HALF)
    check_served(rollout)
    assert {version for *_, version in served(rollout)} == {10}


def round_otherwise(rank: Any) -> None:
    """The next row that this rank rounds into its bucket gets one bit wrong, once."""
    publisher, real = rank.publisher, rank.publisher.fill

    def fill(place: torch.Tensor, rows: torch.Tensor) -> None:
        publisher.fill = real
        real(place, rows)
        place.view(torch.int16 if place.itemsize == 2 else torch.int32)[0, 0] ^= 1

    publisher.fill = fill


def spoil(actor: Any, name: str, after_commit: bool) -> None:
    """The lowest bit of an element that the engine samples from flips, now or after the next commit."""

    def install(rank: Any) -> None:
        receiver, real = rank.receiver, rank.receiver.commit

        def commit(*what: Any) -> None:
            receiver.commit = real
            real(*what)
            flip(rank.engine.runner.weights[name])

        if after_commit:
            receiver.commit = commit
        else:
            flip(rank.engine.runner.weights[name])

    ray.get(actor.__ray_call__.remote(install))


def test_a_handover_changes_nothing(fleets: Fleets) -> None:
    rollout, trainer = fleets
    publish(trainer, rollout, 5, half=HALF)
    before, digest = served(rollout), trainer.digest()
    cards = Handover(rollout, trainer, colocated=True)
    publish(trainer, rollout, 5, half=HALF)
    cards.to_rollout()
    cards.to_rollout()
    assert served(rollout) == before
    cards.to_trainer(weights_stay=True)
    assert trainer.digest() == digest
    cards.to_rollout()
    assert served(rollout) == before
    cards.to_trainer(weights_stay=False)
    publish(trainer, rollout, 5, half=HALF)
    cards.to_rollout()
    assert served(rollout) == before
    trainer.onload()


def test_a_failure_in_the_middle(fleets: Fleets) -> None:
    """An engine that raises, then a trainer rank that dies: the last test of these processes."""
    rollout, trainer = fleets
    publish(trainer, rollout, 6, half=HALF)
    before = served(rollout)
    train(trainer, rollout.model)
    break_in(rollout.engines[0][1].actor, "receiver", "take", 3, "raises")
    with pytest.raises(RunError, match=r"rollout engine 0 rank 1 failed: ValueError: boom"):
        publish(trainer, rollout, 7, half=HALF)
    assert served(rollout) == before
    publish(trainer, rollout, 7, half=HALF)
    after = served(rollout)
    assert after != before
    train(trainer, rollout.model)
    break_in(trainer.ranks[1].actor, "publisher", "pack", 3, "dies")
    start = time.monotonic()
    with pytest.raises(RunError, match=r"trainer rank 1 failed: ActorDiedError"):
        publish(trainer, rollout, 8, half=HALF)
    assert time.monotonic() - start < 30
    assert served(rollout) == after
