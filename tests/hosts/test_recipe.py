"""The script of recipes/cluster starts a Ray on two hosts that a run takes."""

import os
import sys
from pathlib import Path

import pytest

from tests.hosts.conftest import Make
from tests.hosts.namespaces import SHARED
from tests.hosts.runs import RUN, ended
from tests.rl.command import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.hosts]


def test_nodes_by_the_script(make_hosts: Make) -> None:
    net = make_hosts(2)
    (net.shared / "token").write_text("of this test, and long enough to be one")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"RAY_AUTH_TOKEN_PATH": str(SHARED / "token"), "RAY_AUTH_MODE": "token", "PATH": path}
    script, sizes = str(ROOT / "recipes" / "cluster" / "node.sh"), ("--num-cpus=1", "--object-store-memory=100000000")
    for host in net.hosts:
        code, out, err = host.run(script, net[1].address, "--temp-dir=/tmp/r", *sizes, env=env)
        assert code == 0, (out, err)
    address = f"{net[1].address}:6379"
    code, _, err = net[2].run(sys.executable, "-m", "recipes.cluster.wait", address, "2", env=env)
    assert code == 0, err
    shown = ended(net[2].train(*RUN, f"cluster.address={address}", "cluster.nodes=2", "dry_run=true", env=env))
    assert shown.code == 0 and "missing" not in shown.out, shown
    assert "10.77.0.1: 1 trainer rank(s)" in shown.out and "10.77.0.2: 1 trainer rank(s)" in shown.out, shown
