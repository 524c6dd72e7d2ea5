"""A publication in one process: rows of any world size become an engine's weights; what becomes of requests meanwhile."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.host.place import HOST, Place
from kernels.model import ModelConfig
from kernels.weights.cargo import Cargo, Kind, cargo
from kernels.weights.reshard import fsdp_rows
from kernels.weights.routes import Recipient
from rollout.engine import Engine, InFlight
from rollout.receiver import Receiver
from tests.model.shapes import SHAPES, TINY, random_weights
from tests.rollout.scenarios import bits, engine, requests
from tests.weights.test_cargo import adapted, factors_of, merged_whole
from trainer.publisher import Publisher, Sent

HALF = 1 << 14
Between = Callable[[list[Publisher], Receiver], None]


def publish(
    served: Engine,
    config: ModelConfig,
    seed: int,
    version: int,
    size: int = 1,
    in_flight: InFlight = "refuse",
    between: Between = lambda publishers, receiver: None,
    receiver: Receiver | None = None,
) -> None:
    dtype = served.config.dtype
    ranks = [Publisher(config, w, size, dtype, Place(HOST), "") for w in range(size)]
    receiver = receiver or Receiver(served, "engine", "", Place(HOST))
    company = [Recipient("engine", 0, Place(HOST))]
    begun = []
    for w, rank in enumerate(ranks):
        rows = {
            p.name: x[(mine := fsdp_rows(len(x), w, size)).start : mine.stop] for p, x in random_weights(config, seed)
        }
        begun.append(rank.begin("only", rows, company, 1, HALF))
    receiver.begin("only", [ticket for ticket, _ in begun], company, HALF)
    for number in range(max(count for _, count in begun)):
        for rank in ranks:
            rank.pack(number)
        assert not any(Path(ticket.path).exists() for ticket, _ in begun)  # nothing is left behind by whoever dies now
        receiver.take(number)
        between(ranks, receiver)
    sent = [
        sum(parts) % 2**64 for parts in zip(*([row[0] for row in rank.finish().sums] for rank in ranks), strict=True)
    ]
    assert receiver.received() == sent
    receiver.commit(version, in_flight)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["narrow heads", "llama", "experts"])
def test_it_is_a_load(name: str, dtype: torch.dtype, size: int) -> None:
    """In whatever world, the digests of `Engine.load` from whole tensors; rounded once."""
    config = SHAPES.get(name, TINY)
    served = engine(config, dtype=dtype)
    publish(served, config, 3, 8, size)
    other = engine(config, 3, dtype=dtype)
    assert served.version == 8 and served.runner.digests() == other.runner.digests()


@pytest.mark.parametrize("in_flight", ["finish", "abort", "resume"])
def test_requests_in_flight(in_flight: InFlight) -> None:
    """As with `Engine.load`, whose policies are tested by themselves; until the commit they run on the old weights."""

    def in_the_middle(load: Callable[[Engine], None]) -> list[tuple]:
        served = engine(TINY)
        for request in requests(TINY):
            served.add(request)
        done = [c for _ in range(5) for c in served.step()]
        load(served)
        while not served.idle:
            done += served.step()
        return bits(sorted(done, key=lambda c: c.request_id))

    expected = in_the_middle(lambda served: served.load(random_weights(TINY, 1), 8, in_flight) and None)
    assert in_the_middle(lambda served: publish(served, TINY, 1, 8, in_flight=in_flight)) == expected


def test_the_old_weights_serve_until_the_commit() -> None:
    served = engine(TINY)
    expected = bits(served.generate(requests(TINY)))

    def between(publishers: list[Publisher], receiver: Receiver) -> None:
        assert bits(served.generate(requests(TINY)[:2])) == expected[:2]

    publish(served, TINY, 1, 8, between=between)
    assert served.version == 8 and bits(served.generate(requests(TINY))) != expected


@pytest.mark.parametrize("asleep", [False, True])
def test_given_up_in_the_middle(asleep: bool) -> None:
    served = engine(TINY)
    before = served.runner.digests()
    if asleep:
        served.sleep(2)

    def between(publishers: list[Publisher], receiver: Receiver) -> None:
        for rank in publishers:
            rank.cut()
        receiver.abandon()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        publish(served, TINY, 1, 8, 2, between=between)
    assert served.version == (-1 if asleep else 7)
    if not asleep:
        assert served.runner.digests() == before
    publish(served, TINY, 1, 9, 2)
    served.wake()
    assert served.version == 9 and served.runner.digests() == engine(TINY, 1).runner.digests()


def test_one_that_nobody_ended_leaves_nothing_to_the_next() -> None:
    """The driver died in the middle; then the engine slept, so that the next publication needs no second set."""
    served = engine(TINY)
    receiver = Receiver(served, "engine", "", Place(HOST))

    def between(publishers: list[Publisher], receiver: Receiver) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        publish(served, TINY, 2, 8, between=between, receiver=receiver)
    served.sleep(2)
    publish(served, TINY, 1, 9, receiver=receiver)
    served.wake()
    assert served.version == 9 and served.runner.digests() == engine(TINY, 1).runner.digests()


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_and_b_alone_are_a_whole_publication(dtype: torch.dtype, size: int, asleep: bool) -> None:
    """The frozen weights once, then A and B of two versions: what an engine serves that was given merged weights."""
    config = adapted("61 ids", 3)
    plain, frozen = replace(config, adapter=None), {p.name: w.to(dtype) for p, w in random_weights(config)}
    served, other = engine(plain, dtype=dtype), engine(plain, dtype=dtype)
    receiver, company = Receiver(served, "engine", "", Place(HOST)), [Recipient("engine", 0, Place(HOST))]
    ranks = [Publisher(plain, w, size, dtype, Place(HOST), "") for w in range(size)]

    def carry(kind: Kind, whole: dict[str, torch.Tensor], factors: Cargo | None) -> list[Sent]:
        begun = []
        for w, rank in enumerate(ranks):
            rows = {n: x[(mine := fsdp_rows(len(x), w, size)).start : mine.stop] for n, x in whole.items()}
            begun.append(rank.begin(kind, rows, company, 1, HALF, factors))
        receiver.begin(kind, [ticket for ticket, _ in begun], company, HALF, kind, config)
        for number in range(max(count for _, count in begun)):
            for rank in ranks:
                rank.pack(number)
            receiver.take(number)
        return [rank.finish() for rank in ranks]

    whole = carry("frozen", frozen, None)
    receiver.keep()
    for version in (8, 9):
        if asleep:
            served.sleep(2)
        factors = factors_of(config, seed=version)
        merged = merged_whole(config, factors, dtype)
        sent = carry("factors", merged | factors, cargo("factors", config, dtype))
        assert receiver.received() == [
            sum(s) % 2**64 for s in zip(*([r[0] for r in one.sums] for one in sent), strict=True)
        ]
        receiver.commit(version)
        if asleep:
            served.wake()
        other.load(((p, merged[p.name]) for p, _ in random_weights(plain)), version)
        assert served.version == version and served.runner.digests() == other.runner.digests()
        assert sum(one.packed for one in sent) == sum(4 * f.numel() for f in factors.values())
    assert sum(one.packed for one in whole) == sum(w.numel() * dtype.itemsize for w in frozen.values())
