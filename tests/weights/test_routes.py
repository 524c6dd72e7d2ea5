"""Every recipient gets every rank's bytes once, and a host gets each shard's once, wherever ranks and engines are."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.host.place import Place
from kernels.weights.bucket import SharedBucket
from kernels.weights.routes import Recipient, Way, followers, serving, way, wired

HOSTS = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
places = st.builds(Place, st.sampled_from(HOSTS), st.sampled_from([0, 1, 2]))
on_cpu = st.builds(Place, st.sampled_from(HOSTS))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[Place], list[Recipient]]:
    """Trainer ranks anywhere; engines that have a host each."""
    where = draw(st.sampled_from([places, on_cpu]))
    shards = draw(st.sampled_from([1, 2, 4]))
    company = []
    for engine in range(draw(st.integers(1, 4))):
        host = draw(st.sampled_from(HOSTS))
        for shard in range(shards):
            card = draw(where).card
            company.append(Recipient(f"engine {engine} rank {shard}", shard, Place(host, card)))
    return draw(st.lists(where, min_size=1, max_size=4)), company


@given(layouts())
def test_every_byte_arrives_once_and_crosses_once_a_host(layout: tuple[list[Place], list[Recipient]]) -> None:
    sources, company = layout
    for source in sources:
        crossing = []
        for to in company:
            by = way(source, to, company)
            if by.shared:  # memory is only ever of one place
                assert (by.relay.place if by.relay else source) == to.place
            if by.relay:
                assert by.relay.place.host == to.place.host != source.host and by.relay.shard == to.shard
                assert way(source, by.relay, company) == Way(None, False)
                assert to in followers(by.relay, sources, company, by.shared)
            elif source.host != to.place.host:
                crossing.append((to.place.host, to.shard))
            assert (to in wired(source, company)) == (by == Way(None, False))
        far = {to.place.host for to in company} - {source.host}
        assert sorted(crossing) == sorted(product(far, {to.shard for to in company if to.place.host in far}))


@given(layouts(), st.sampled_from([1, 2, 4]))
def test_a_replica_at_hand_serves(layout: tuple[list[Place], list[Recipient]], replicas: int) -> None:
    sources, company = layout
    sets = [sources] * (replicas - 1) + [[Place(HOSTS[0], p.card) for p in sources]]
    for to, g in zip(company, serving(sets, company), strict=True):
        near = [sum(p.host == to.place.host for p in one) for one in sets]
        assert near[g] == max(near) or any(p == to.place for p in sets[g])


def test_a_host_opens_no_memory_of_another() -> None:
    """Not even where a file of that name is there."""
    here, there = Place(HOSTS[0]), Place(HOSTS[1])
    bucket = SharedBucket(64, here)
    bucket.halves[0].fill_(7)
    assert torch.equal(bucket.ticket.open(here)[0], bucket.halves[0])
    with pytest.raises(ValueError, match=r"a bucket on 10\.0\.0\.1 was to be opened on 10\.0\.0\.2"):
        bucket.ticket.open(there)
    with pytest.raises(ValueError, match=r"card 0 of 10\.0\.0\.1 was to be opened on card 0 of 10\.0\.0\.2"):
        type(bucket.ticket)(b"", "", Place(HOSTS[0], 0), 64).open(Place(HOSTS[1], 0))
