"""Which card each process has."""

import pytest

from kernels.host.place import HOST
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
