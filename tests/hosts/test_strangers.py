"""A cluster that asks for a token lets a run in that has it, and tells others so in one line; as it does of other addresses."""

import sys

import pytest

from tests.hosts.conftest import Make
from tests.hosts.namespaces import Hosts
from tests.hosts.runs import run

pytestmark = [pytest.mark.slow, pytest.mark.hosts]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of this test"}


@pytest.fixture(scope="module")
def guarded(make_hosts: Make) -> Hosts:
    net = make_hosts(1)
    net.ray(env=TOKEN)
    return net


def test_the_right_token(guarded: Hosts) -> None:
    shown = run(guarded[1], "right", "dry_run=true", f"cluster.address={guarded[1].address}:6379", env=TOKEN)
    assert shown.code == 0 and "10.77.0.1: 2 trainer rank(s), 2 engine(s)" in shown.out, shown


@pytest.mark.parametrize(
    "held", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}, {"RAY_AUTH_MODE": "token"}]
)
def test_no_token_or_a_wrong_one(guarded: Hosts, held: dict[str, str]) -> None:
    address = f"{guarded[1].address}:6379"
    line = run(guarded[1], "wrong", f"cluster.address={address}", env=held).error()
    assert line.startswith(f"cluster.address={address}: Ray refuses this process: ") and "token" in line, line
    code, _, said = guarded[1].run(sys.executable, "-m", "recipes.cluster.wait", address, "1", env=held, timeout=120)
    assert code == 2 and "Ray refuses this process" in said, said


def test_an_address_where_nothing_is(guarded: Hosts) -> None:
    for address in ("10.77.0.1:6380", "10.77.0.9:6379"):
        line = run(guarded[1], "nothing", f"cluster.address={address}").error()
        assert line.startswith(f"cluster.address={address}: n") and line.endswith("'local' starts Ray")
