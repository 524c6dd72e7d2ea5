"""Which card each process has."""

import pytest
from hypothesis import given, settings
from hypothesis.strategies import DataObject, data, integers, lists, none, sampled_from

from kernels.host.place import HOST, Place
from rl.cluster.nodes import card_numbers
from rl.compose import check
from rl.config import RunConfig
from rl.errors import UserError
from rl.placement import Node, Placement, choose, place

GPU = ("device=cuda", "out_dir=unused")


def on_one(config: RunConfig, cards: int) -> Placement:
    return place(config, choose(config, [Node(HOST, tuple(range(cards)), cpus=2)]))


def cards_of(placement: Placement) -> tuple[tuple, tuple]:
    """All of them are of this host."""
    assert {p.host for p in placement.trainer + placement.rollout} == {HOST}
    return tuple(p.card for p in placement.trainer), tuple(p.card for p in placement.rollout)


def test_a_cpu_has_no_cards() -> None:
    for how in ("colocated", "split"):
        placement = on_one(check([f"cluster.placement={how}", "rollout.tp=2", "out_dir=unused"])[0], 0)
        assert cards_of(placement) == ((None,) * 2, (None,) * 2)


@pytest.mark.parametrize(
    ("cards", "trainer", "rollout"),
    [(8, (0, 1), (0, 1, 2, 3)), (2, (0, 1), (0, 1, 0, 1)), (1, (0, 0), (0, 0, 0, 0))],
)
def test_colocated_ranks_go_round_the_cards(cards: int, trainer: tuple, rollout: tuple) -> None:
    config = check([*GPU, "trainer.world_size=2", "rollout.tp=2", "rollout.replicas=2"])[0]
    placement = on_one(config, cards)
    assert cards_of(placement) == (trainer, rollout)


def test_no_card_is_told() -> None:
    with pytest.raises(UserError, match="device=cuda: this machine has no CUDA device"):
        on_one(check(GPU)[0], 0)


def test_split_ranks_have_a_card_each() -> None:
    split = (*GPU, "cluster.placement=split", "trainer.world_size=2", "rollout.tp=2", "rollout.replicas=1")
    placement = on_one(check(split)[0], 5)
    assert cards_of(placement) == ((0, 1), (2, 3))
    with pytest.raises(UserError, match=r"split needs 4 cards \(trainer.world_size=2 \+ .*=2\) and this machine has 3"):
        on_one(check(split)[0], 3)


CLUSTER = ("cluster.address=auto", "out_dir=unused")
BASE = check(CLUSTER)[0]


def config_of(*overrides: str) -> RunConfig:
    return check([*CLUSTER, *overrides])[0]


def cluster_of(*cards: int) -> list[Node]:
    return [Node(f"10.0.0.{i}", tuple(range(count)), cpus=count or 1) for i, count in enumerate(cards, 1)]


@settings(max_examples=300, deadline=None)
@given(data())
def test_every_rank_has_one_place_and_an_engine_one_node(draw: DataObject) -> None:
    """On any cluster: ranks of a kind share a card only where there are too few, a split shares none, and where it is refused
    there was no room."""
    sizes = draw.draw(lists(integers(0, 9), min_size=1, max_size=6))
    world, tp, replicas = (draw.draw(sampled_from(some)) for some in ((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 3, 5)))
    device, how = draw.draw(sampled_from(("cpu", "cuda"))), draw.draw(sampled_from(("colocated", "split")))
    count = draw.draw(none() | integers(1, len(sizes)))
    config = BASE.model_copy(
        update={
            "device": device,
            "trainer": BASE.trainer.model_copy(update={"world_size": world}),
            "rollout": BASE.rollout.model_copy(update={"tp": tp, "replicas": replicas}),
            "cluster": BASE.cluster.model_copy(update={"placement": how, "nodes": count}),
        }
    )
    nodes = [Node(f"10.0.0.{i}", tuple(range(n)), cpus=max(n, 1)) for i, n in enumerate(sizes)]
    usable = sorted((n for n in sizes if n or device == "cpu"), reverse=True)
    try:
        placement = place(config, choose(config, nodes))
    except UserError as error:
        assert device == "cuda"
        assert all(f"10.0.0.{i} has {n} card" in str(error) for i, n in enumerate(sizes) if n and not count)
        short = how == "split" and _room(usable[: count or None], world, tp) < replicas
        assert short or len(usable) < (count or 1)
        return
    assert (len(placement.trainer), len(placement.rollout)) == (world, tp * replicas)
    assert len(placement.hosts) <= (count or len(usable))
    for engine in range(replicas):
        assert len({p.host for p in placement.rollout[engine * tp : (engine + 1) * tp]}) == 1
    own = [p for p in placement.trainer + placement.rollout if p.card is not None]
    if how == "split":
        assert len(own) == len(set(own))
    elif device == "cuda" and world <= sum(usable[: count or None]) and count:
        assert len(set(placement.trainer)) == world


def _room(cards: list[int], world: int, tp: int) -> int:
    """Engines that fit beside the trainer's ranks, which fill the first nodes."""
    engines = 0
    for n in cards:
        ranks = min(world, n)
        world, engines = world - ranks, engines + (n - ranks) // tp
    return -1 if world else engines


def test_a_run_takes_the_fewest_nodes_that_have_a_card_for_every_rank() -> None:
    sixteen = ("device=cuda", "trainer.world_size=16", "rollout.tp=4", "rollout.replicas=4")
    chosen = choose(config_of(*sixteen), cluster_of(8, 8, 8, 0))
    assert [n.host for n in chosen] == ["10.0.0.1", "10.0.0.2"]
    placement = place(config_of(*sixteen), chosen)
    assert placement.trainer == tuple(Place(f"10.0.0.{1 + r // 8}", r % 8) for r in range(16)) == placement.rollout
    split = (*sixteen, "cluster.placement=split")
    assert len(choose(config_of(*split), cluster_of(8, 8, 8, 8))) == 4
    with pytest.raises(
        UserError, match=r"split needs 32 cards .*an engine's on one node, and 10.0.0.1 has 8 card\(s\), "
    ):
        choose(config_of(*split), cluster_of(8, 8, 8))
    with pytest.raises(
        UserError,
        match=r"^cluster.nodes=3: Ray at .* has 2 node\(s\) with a card \(10.0.0.1 has 8 card\(s\), .*3 has 0",
    ):
        choose(config_of(*sixteen, "cluster.nodes=3"), cluster_of(8, 8, 0))


def test_so_many_nodes_as_are_asked_for_are_used_evenly() -> None:
    four = ("device=cuda", "trainer.world_size=4", "rollout.tp=2", "rollout.replicas=2", "cluster.nodes=2")
    placement = place(config_of(*four), choose(config_of(*four), cluster_of(8, 8)))
    assert (
        [p.host for p in placement.trainer]
        == [p.host for p in placement.rollout]
        == ["10.0.0.1"] * 2 + ["10.0.0.2"] * 2
    )
    split = config_of(*four, "cluster.placement=split")
    placement = place(split, choose(split, cluster_of(8, 8)))
    assert {p.host for p in placement.trainer} == {"10.0.0.1"} and {p.host for p in placement.rollout} == {"10.0.0.2"}


def test_one_host_is_one_node() -> None:
    with pytest.raises(UserError, match=r"cluster.nodes=2: cluster.address=local is one node; give the address"):
        on_one(check(["cluster.nodes=2", "out_dir=unused"])[0], 0)


@pytest.mark.parametrize(
    ("names", "visible", "numbers"),
    [(["0", "3"], "", (0, 3)), (["6", "4"], "4,5,6", (0, 2)), (["GPU-b"], "GPU-a,GPU-b", (1,))],
)
def test_a_card_has_the_number_that_its_node_gives_it(names: list[str], visible: str, numbers: tuple[int, ...]) -> None:
    assert card_numbers(names, visible) == numbers
