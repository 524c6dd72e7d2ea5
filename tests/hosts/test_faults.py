"""A node or a rank that is lost, in whatever way, ends the run soon with one line that names it; the run goes on without it."""

import re
import signal
import time

import pytest

from tests.hosts.conftest import Make
from tests.hosts.namespaces import SHARED, Hosts
from tests.hosts.runs import RECORDED, RUN, begun, ended, run, sha256, wait_for_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.hosts]
SOON = 240.0  # seconds: 60 on a machine that is not busy


@pytest.fixture(scope="module")
def two(make_hosts: Make) -> Hosts:
    net = make_hosts(2)
    net.ray()
    return net


def test_a_rank_that_stands_still(two: Hosts) -> None:
    """On another node, where no one sees its process: it gives no sign of life."""
    running = begun(two[1], "stopped", "cluster.patience=15")
    (rank,) = two[2].processes("ray::TrainerRank")
    rank.send_signal(signal.SIGSTOP)
    since = time.monotonic()
    line = ended(running).error(code=1)
    assert time.monotonic() - since < SOON
    assert re.match(
        r"(step \d+ of the warm start: )?trainer rank \d \(10\.77\.0\.2\) gave no sign of life for cluster\.patience=15 s; it "
        r"was in .* at .*, while trainer rank \d \(10\.77\.0\.1\) was in .* at .*, waiting in all_\w+ \(number \d+\)",
        line,
    ), line
    rank.wait(30)  # it was ended there


def test_a_link_that_is_cut(two: Hosts) -> None:
    """Nothing is refused, nothing answers; Ray itself would tell after a minute."""
    running = begun(two[1], "cut")
    two.cut(2)
    since = time.monotonic()
    try:
        line = ended(running).error(code=1)
    finally:
        two.mend(2)
    assert time.monotonic() - since < SOON
    assert "node 10.77.0.2 was lost, and with it " in line and "(10.77.0.2)" in line, line
    assert line.endswith("the same command goes on from the last checkpoint, with fewer nodes too"), line


def test_a_host_that_is_killed_and_a_run_that_goes_on_without_it(make_hosts: Make) -> None:
    net = make_hosts(2)
    net.ray()
    running = net[1].train(*RUN, f"out_dir={SHARED / 'killed'}", "steps=200")
    wait_for_checkpoint(net, "killed", 1, running)
    net[2].kill()
    since = time.monotonic()
    line = ended(running).error(code=1)
    assert time.monotonic() - since < SOON
    assert "node 10.77.0.2 was lost, and with it " in line, line
    done = run(net[1], "killed", "cluster.nodes=1")
    assert done.code == 0, done
    assert sha256(net, "killed") == RECORDED
