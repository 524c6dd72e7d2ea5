"""A run on several hosts ends with the hash of one host, wherever its ranks are and whatever the network does."""

import pytest

from tests.hosts.conftest import Make
from tests.hosts.namespaces import Hosts
from tests.hosts.runs import LONG_ONES, RECORDED, run, sha256

pytestmark = [pytest.mark.slow, pytest.mark.hosts]


@pytest.fixture(scope="module")
def two(make_hosts: Make) -> Hosts:
    """Two, of which the second is behind a cable that can be spoiled."""
    net = make_hosts(2, cable=True)
    net.ray()
    return net


def test_colocated_and_driven_from_a_node_that_is_not_the_head(two: Hosts) -> None:
    """As in a job, Ray is named by its variable."""
    done = run(two[2], "colocated", "cluster.nodes=2", env={"RAY_ADDRESS": f"{two[1].address}:6379"})
    assert done.code == 0, done
    assert sha256(two, "colocated") == RECORDED


def test_split_over_a_slow_network_that_loses_packets(two: Hosts) -> None:
    """The trainer is on one host, the engine on the other, and neither waits at its loopback address."""
    two.spoil(delay=5, loss=1, rate=100)
    try:
        done = run(two[1], "split", "cluster.placement=split", "cluster.nodes=2", "rollout.tp=2", "rollout.replicas=1")
    finally:
        two.spoil(0, 0, 0)
    assert done.code == 0, done
    assert sha256(two, "split") == RECORDED


def test_what_is_missing_is_named_before_anything_starts(two: Hosts) -> None:
    asked = ("cluster.nodes=3", "dry_run=true")
    shown = run(two[1], "none", *asked)
    assert (
        shown.code == 0 and "missing: cluster.nodes=3: Ray at cluster.address=auto has 2 node(s) (10.77.0." in shown.out
    )
    line = run(two[1], "none", "cluster.nodes=3").error()
    assert line.endswith("10.77.0.1 has 1 core(s), 10.77.0.2 has 1 core(s)): start Ray on more, or lower it")
    assert "has no CUDA" not in (line := run(two[1], "none", "device=cuda", "model.dtype=bfloat16").error()), line
    assert "has 0 node(s) with a card (10.77.0.1 has 0 card(s), 10.77.0.2 has 0 card(s))" in line
    assert not (two.shared / "none").exists()


def test_an_interface_that_is_not_there(two: Hosts) -> None:
    line = run(two[1], "other", "cluster.interface=eth7").error()
    assert line.startswith(
        "cluster.interface=eth7: h1 has no such network interface with an IPv4 address: it has lo (127.0.0.1), "
    )
    assert "eth0 (10.77.0.1)" in line


@LONG_ONES
def test_four_hosts(make_hosts: Make) -> None:
    net = make_hosts(4)
    net.ray()
    layout = ("trainer.world_size=4", "rollout.tp=1", "rollout.replicas=4", "trainer.micro_leaves=1")
    done = run(net[1], "four", "cluster.nodes=4", *layout)
    assert done.code == 0, done
    assert sha256(net, "four") == RECORDED
