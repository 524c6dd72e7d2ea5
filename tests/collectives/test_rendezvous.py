"""How long ranks wait for each other is one number, of every group that a process makes."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from kernels.collectives.levels import subgroup
from kernels.collectives.rendezvous import PATIENCE, address_of, connect, join, listen, patience
from rl.compose import check


@pytest.mark.parametrize(("seconds", "waits"), [(None, PATIENCE), (7.5, timedelta(seconds=7.5))])
def test_groups_wait_as_long_as_they_are_told(seconds: float | None, waits: timedelta) -> None:
    store = listen()
    group = join(address_of(store), "cpu", 0, 1, seconds=seconds)
    try:
        for one in (group, subgroup([0])):
            assert one._get_backend(torch.device("cpu")).options._timeout == waits
        assert connect(address_of(store)).timeout == patience() == waits
    finally:
        dist.destroy_process_group()


def test_a_rank_that_does_not_come_is_waited_for_so_long() -> None:
    """Its absence is told after the seconds that were given, and not after PATIENCE."""
    store, begun = listen(), time.monotonic()
    with pytest.raises(RuntimeError):
        join(address_of(store), "cpu", 0, 2, seconds=2)
    assert 1 < time.monotonic() - begun < PATIENCE.total_seconds() / 2


def test_a_run_says_it_once() -> None:
    """The driver names who is missing before the others give up, and they wait for ranks that are still starting."""
    for keys, seconds in (((), 180), (("cluster.patience=600",), 1200), (("cluster.timeout=900",), 900)):
        assert check([*keys])[0].cluster.collective_seconds == seconds
