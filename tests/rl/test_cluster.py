"""Which failure is the cause, and which ports are taken, without starting Ray."""

import socket
import sys

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from kernels.collectives.rendezvous import address_of, connect
from kernels.failures import RankLost
from rl.cluster import RolloutFleet, rendezvous
from rl.cluster.calls import Rank, root_cause
from rl.cluster.ray_processes import check_address
from rl.errors import RunError, UserError
from rl.placement import CPU
from rollout.sampling import Completion, Request, RequestError, SamplingParams
from tests.model.shapes import TINY


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("step", "traceback", cause)


BROKEN = ("trainer rank 0", task_error(RankLost("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("failure", "part"),
    [
        (("trainer rank 1", ActorDiedError()), "trainer rank 1 failed: ActorDiedError"),
        (("trainer rank 1", task_error(ValueError("bad\n row"))), "trainer rank 1 failed: ValueError: bad row"),
    ],
)
def test_the_cause_comes_before_what_it_broke(failure: tuple, part: str, order: int) -> None:
    error = root_cause([BROKEN, failure][::order])
    assert isinstance(error, RunError) and part in str(error) and "\n" not in str(error)


def test_bad_input_stays_bad_input() -> None:
    cause = RequestError("request 3: too long")
    assert root_cause([BROKEN, ("rollout engine 0 rank 0", task_error(cause))]) is cause


def test_a_broken_connection_alone_is_named() -> None:
    assert "trainer rank 0 lost another rank, and none says why: [gloo" in str(root_cause([BROKEN]))


def test_a_rendezvous_keeps_its_port_from_the_start() -> None:
    """Before any rank arrives: what is bound meanwhile, by another run say, must not be it."""
    stores = rendezvous(0, 4)
    assert len({store.port for store in stores}) == 4
    for store in stores:
        with pytest.raises(UserError, match=f"cluster.port={store.port}: port {store.port} is in use"):
            rendezvous(store.port, 1)
        connect(address_of(store)).set("who", str(store.port))
    assert [int(store.get("who")) for store in stores] == [store.port for store in stores]


@pytest.mark.skipif(sys.platform != "linux", reason="needs another loopback address")
def test_a_rendezvous_listens_to_this_host_alone() -> None:
    (store,) = rendezvous(0, 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:6379", "127.0.0.1:99999"]
)
def test_nothing_at_the_address(address: str) -> None:
    with pytest.raises(UserError, match="nothing answers there"):
        check_address(address)


def test_replicas_share_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is served once, completions come in the order of the requests, a prompt stays on one engine."""
    served: list[list[Request]] = []

    class Method:
        def remote(self, share: list[Request]) -> tuple:
            served.append(share)
            done = [Completion(r.id, (r.id,), (0.0,), "stop", 0, i) for r in share for i in range(r.sampling.n)]
            return tuple(reversed(done))

    class Actor:
        generate = Method()

    monkeypatch.setattr("rl.cluster.fleets.gather", lambda calls, patience: list(calls))
    rng = np.random.default_rng(0)
    prompts = [(int(rng.integers(5)),) for _ in range(7)]
    requests = [Request(10 * i + j, p, SamplingParams(4, n=j + 1)) for i, p in enumerate(prompts) for j in range(3)]
    fleet = RolloutFleet([[Rank(name, Actor())] for name in "abc"], TINY, [CPU] * 3)
    done = fleet.generate(requests)
    assert [(c.request_id, c.sample) for c in done] == [(r.id, i) for r in requests for i in range(r.sampling.n)]
    assert sorted(r.id for share in served for r in share) == sorted(r.id for r in requests)
    owners = [{r.prompt_ids for r in share} for share in served]
    assert sum(map(len, owners)) == len(set().union(*owners)) == len(set(prompts))
