"""A publication between hosts: each byte crosses once a host, and an engine that dies leaves the others as they were.

The hosts are loopback addresses of this machine, which processes are told: what decides between memory and the network is the
place alone.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import pytest
import ray
import torch

from kernels.host.place import Place
from kernels.model import served as parameters
from kernels.tree import Shard
from kernels.weights.cargo import cargo
from rl.cluster import cluster
from rl.cluster.nodes import Reserved
from rl.compose import check
from rl.errors import RunError
from rl.model import model_config
from rl.placement import Placement
from rl.publish import publish
from tests.rl.faults import break_in
from tests.rl.test_publish import HALF, SHORT, Fleets, corrupt, served, train

pytestmark = pytest.mark.slow

ONE, TWO, THREE = (Place(f"127.0.0.{i}") for i in (1, 2, 3))
LAYOUT = ("rollout.max_new_tokens=6", "trainer.world_size=2", "model.hf.num_hidden_layers=1", "cluster.timeout=1200")


@contextmanager
def started(
    patch: pytest.MonkeyPatch, trainer: tuple[Place, ...], engines: tuple[Place, ...], tp: int, *more: str
) -> Iterator[Fleets]:
    """Trainer ranks at these places, and engines of `tp` ranks, each at one."""
    placement = Placement(trainer, tuple(place for place in engines for _ in range(tp)))
    patch.setattr("rl.cluster.start.reserved", lambda config: nullcontext(Reserved(placement, {})))
    config = check([*SHORT, *LAYOUT, f"rollout.tp={tp}", f"rollout.replicas={len(engines)}", "out_dir=unused", *more])[
        0
    ]
    with cluster(config, model_config(config, 64)) as fleets:
        yield fleets


def size(fleets: Fleets, itemsize: int = 4) -> int:
    return sum(prod(p.shape) for p in parameters(fleets[0].model)) * itemsize


@pytest.fixture(scope="module")
def fleets() -> Iterator[Fleets]:
    """Two engines on one host, one beside half of the trainer."""
    with pytest.MonkeyPatch.context() as patch, started(patch, (ONE, THREE), (TWO, TWO, THREE), 2) as both:
        publish(both[1], both[0], 1, half=HALF)
        both[0].wake()
        yield both


def test_each_byte_crosses_once_a_host(fleets: Fleets) -> None:
    rollout, trainer = fleets
    before = served(rollout)
    small = publish(trainer, rollout, 1, half=HALF)
    crossed, whole = dict(rollout.crossed), size(fleets)
    assert small == publish(trainer, rollout, 1) and served(rollout) == before
    # host 2 needs all of it, half from each; host 3 the half that it has not
    ways = [("127.0.0.1", "127.0.0.2"), ("127.0.0.3", "127.0.0.2"), ("127.0.0.1", "127.0.0.3")]
    assert sorted(crossed) == sorted(ways)
    assert 1.4 * whole <= sum(crossed.values()) <= 1.1 * 1.5 * whole, (crossed, whole)


def test_a_flipped_bit_and_an_engine_that_dies(fleets: Fleets) -> None:
    """On the host that passes bytes on, in the middle: everybody else goes on with the old version. The last test of these."""
    rollout, trainer = fleets
    before = served(rollout)
    train(trainer, rollout.model)
    corrupt(rollout.engines[1][1].actor, "layers.0.down")
    with pytest.raises(RunError, match=r"engine 1 rank 1 \(127.0.0.2\) received other weights .* 2: layers.0.down"):
        publish(trainer, rollout, 2, half=HALF)
    assert served(rollout) == before
    publish(trainer, rollout, 2, half=HALF)
    after = served(rollout)
    assert after != before and {version for *_, version in after} == {2}
    train(trainer, rollout.model)
    break_in(rollout.engines[0][1].actor, "receiver", "take", 3, "dies")
    begun = time.monotonic()
    with pytest.raises(RunError, match=r"rollout engine 0 rank 1 \(127.0.0.2\)"):
        publish(trainer, rollout, 3, half=HALF)
    assert time.monotonic() - begun < 120
    rollout.engines = rollout.engines[1:]  # the first one lacks a rank
    assert served(rollout) == after


def test_replicas_serve_their_own_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each host has the whole model, nothing crosses; a replica that differs is named."""
    with started(monkeypatch, (ONE, TWO), (ONE, TWO), 1, "trainer.replicas=2") as fleets:
        rollout, trainer = fleets
        publish(trainer, rollout, 1, half=HALF)
        rollout.wake()
        assert rollout.crossed == {} and len({c[:2] for c in served(rollout)}) > 1
        before = served(rollout)
        train(trainer, rollout.model)
        publish(trainer, rollout, 2, half=HALF)
        assert rollout.crossed == {} and served(rollout) != before
        ray.get(trainer.ranks[1].actor.__ray_call__.remote(spoil))
        with pytest.raises(
            RunError, match=r"replica 1 of the trainer holds other weights than replica 0: layers.0.down"
        ):
            publish(trainer, rollout, 3, half=HALF)


def spoil(rank: Any) -> None:
    """An element of a master weight changes."""
    rank.trainer.rows()["layers.0.down"].view(-1)[7] += 1


def flip(rank: Any) -> None:
    """A bit of the frozen weights that an engine keeps."""
    rank.receiver._frozen["head"].view(-1).view(torch.int32)[77] ^= 1


def test_adapters_cross_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To another host go the frozen weights once, and from then on A and B: the weights are those of a whole publication, and
    an engine that slept without memory gets them too."""
    adapter = ("warmup.steps=0", "adapter.rank={attention:4,head:3}")
    with started(monkeypatch, (ONE, ONE), (ONE, TWO), 2, *adapter) as fleets:
        rollout, trainer = fleets
        assert trainer.model and trainer.model.adapter
        factors = cargo("factors", trainer.model, torch.float32).parameters
        shards = 4 * sum(p.part(Shard(s, 2)).held for p in factors for s in range(2))
        first = publish(trainer, rollout, 1, half=HALF)
        assert size(fleets) + shards <= sum(rollout.crossed.values()) < 1.1 * (size(fleets) + shards)
        rollout.wake()
        before = served(rollout)
        for version, asleep in ((2, False), (3, True)):
            train(trainer, rollout.model)
            if asleep:
                rollout.sleep(2)
            assert publish(trainer, rollout, version, half=HALF) != first
            if asleep:
                rollout.wake()
            assert rollout.packed == shards <= sum(rollout.crossed.values()) < 1.1 * shards
        after = [one[:2] for one in served(rollout)]
        assert after != [one[:2] for one in before]
        actor = rollout.engines[1][1].actor
        ray.get(actor.__ray_call__.remote(flip))
        with pytest.raises(RunError, match=r"engine 1 rank 1 .* received other weights .*: head"):
            publish(trainer, rollout, 4, half=HALF)
        assert [one[:2] for one in served(rollout)] == after
        ray.get(actor.__ray_call__.remote(flip))
        apart = publish(trainer, rollout, 4, half=HALF)
        trainer.sends = "weights"
        assert publish(trainer, rollout, 5, half=HALF) == apart and rollout.packed > 1.9 * size(fleets) / 2
        assert [one[:2] for one in served(rollout)] == after
