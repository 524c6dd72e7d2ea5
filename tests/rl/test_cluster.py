"""Which failure is the cause, and which ports are taken, without starting Ray."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
from ray.exceptions import ActorDiedError, AuthenticationError, RayTaskError

from kernels.collectives.rendezvous import address_of, connect
from kernels.host.command import Terminated
from kernels.host.failures import RankLost
from kernels.host.place import HOST, Place
from recipes.cluster.wait import main as wait
from rl.cluster import RolloutFleet, TrainerFleet, rendezvous
from rl.cluster.calls import gather, root_cause, settle
from rl.cluster.family import WORDLESS
from rl.cluster.probe import TokenError, check_address
from rl.cluster.ray_processes import RayLost, _hush_threads, check_ray, unstarted
from rl.cluster.watch import Rank
from rl.errors import RunError, UserError
from rollout.sampling import Completion, Request, RequestError, SamplingParams
from tests.model.shapes import TINY
from tests.rl.command import ROOT
from trainer.loss import LikelihoodLoss


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


class Http(http.server.BaseHTTPRequestHandler):
    def log_message(self, *what: object) -> None:
        pass


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_another_server_at_the_address(prefix: str) -> None:
    """Ray would ask it for minutes."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Http) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=r"a server answers there that is not Ray's"):
            check_address(f"{prefix}127.0.0.1:{server.server_port}")
        server.shutdown()


SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
REFUSED = b"\x88@\x0ccontent-type\x10application/grpc\x00\x0bgrpc-status\x0216\x00\x0cgrpc-message\x01x"
"""What Ray 2.60 answers a call whose token is missing or wrong."""


@contextlib.contextmanager
def ray_that_answers(headers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """Its address, and what it is asked."""
    asked = list[bytes]()

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(33)
        connection.sendall(SETTINGS)
        while b"NodeInfoGcsService" not in b"".join(asked):
            asked.append(connection.recv(4096))
        connection.sendall(bytes([0, 0, len(headers), 1, 5, 0, 0, 0, 1]) + headers)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", asked


@pytest.mark.parametrize("by", ["address", "auto"])
@pytest.mark.parametrize("held", ["", "x" * 200])
def test_a_token_that_ray_refuses_is_told_at_once(by: str, held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client asks for twenty seconds, with a warning a second."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    if held:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", held)
    says = "the token here is another" if held else "this process has no RAY_AUTH_MODE"
    with ray_that_answers(REFUSED) as (address, asked):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(TokenError, match=f"^cluster.address={address}: Ray refuses this process: .*{says}$"):
            check_address(address if by == "address" else "auto")
    bearer = b"\x0dauthorization\x7f\x50Bearer " + held.encode()  # 207 bytes: 127 and 80
    assert (bearer in b"".join(asked)) == bool(held)


def test_a_token_in_a_file_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("of a file\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with ray_that_answers(b"\x88@\x0bgrpc-status\x010") as (address, asked):
        check_address(address)
    assert b"\x10Bearer of a file" in b"".join(asked)


def test_what_auto_stands_for_may_be_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file of a Ray that has ended: Ray itself looks for another."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    check_address("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    check_address("auto")


def test_who_waits_for_a_cluster_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with ray_that_answers(REFUSED) as (address, _):
        assert wait(address, 1) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Ray refuses this process" in line
    assert wait("127.0.0.1:1", 1, seconds=1) == 1
    assert "0 of 1 nodes" in capsys.readouterr().err


@pytest.mark.parametrize("says", [b"", b"-ERR unknown command\r\n", b"\0"])
def test_a_server_that_says_little(says: bytes) -> None:
    """It ends the connection, or speaks something else."""

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        connection.recv(100)
        connection.sendall(says)
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        with pytest.raises(UserError, match=r"is not Ray's|nothing answers"):
            check_address(f"127.0.0.1:{listener.getsockname()[1]}")


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(UserError, match="within 5 s"):
        check_address(f"127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.parametrize(
    ("error", "kind", "part"),
    [
        (
            OSError("AF_UNIX path length cannot exceed 107 bytes"),
            UserError,
            "set RAY_TMPDIR to another, short and writable",
        ),
        (NotADirectoryError(20, "Not a directory", "/dev/null/x"), UserError, "RAY_TMPDIR"),
        (ConnectionError("no Ray instance"), UserError, "no Ray instance"),
        (
            Exception("The current node timed out\nduring startup."),
            RunError,
            "The current node timed out during startup.",
        ),
        (Exception(), RunError, "Exception"),
        (ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"), UserError, "wants RAY_AUTH_MODE=token"),
        (AuthenticationError("InvalidAuthToken"), UserError, ": a cluster that asks for a token"),
    ],
)
def test_ray_that_does_not_start(error: Exception, kind: type[Exception], part: str) -> None:
    said = unstarted(error, "(cluster.address=local)")
    assert type(said) is kind and part in str(said) and "\n" not in str(said)


@pytest.mark.parametrize("address", ["cluster", "autoo", "10.0.0.1"])
def test_an_address_without_a_port(address: str) -> None:
    check_address("auto")
    with pytest.raises(UserError, match=rf"^cluster.address={address}: write auto, local or HOST:PORT$"):
        check_address(address)


def test_a_server_of_rays_that_is_out_of_reach_is_lost_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers now and then is not; one that refuses is at once."""
    clock, raised = [0.0], list[OSError | None]([None])

    def connect_to(address: tuple[str, int], timeout: float) -> socket.socket:
        clock[0] += timeout
        if raised[0] is not None:
            raise raised[0]
        return socket.socket()

    monkeypatch.setattr("rl.cluster.ray_processes.ray.is_initialized", lambda: True)
    monkeypatch.setattr("rl.cluster.ray_processes.ray.get_runtime_context", mock.MagicMock())
    monkeypatch.setattr("rl.cluster.ray_processes._servers", lambda node: (("GCS", "10.0.0.1", 6379),))
    monkeypatch.setattr("rl.cluster.ray_processes.socket.create_connection", connect_to)
    monkeypatch.setattr("rl.cluster.ray_processes.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("rl.cluster.ray_processes._silent", {})
    for error in (TimeoutError(), TimeoutError(), TimeoutError(), None) * 5:
        raised[0] = error
        check_ray()
    raised[0] = TimeoutError()
    with pytest.raises(RayLost, match=r"^Ray.s GCS \(10.0.0.1:6379\) has not answered for 25 s: the network"):
        for _ in range(8):
            check_ray()
    raised[0] = ConnectionRefusedError(111, "Connection refused")
    with pytest.raises(RayLost, match="has ended: Connection refused"):
        check_ray()


class Process:
    """A process that is stopped for as long as `stopped` says."""

    pid, killed, stopped = 4321, False, True

    def status(self) -> str:
        return psutil.STATUS_STOPPED if self.stopped else psutil.STATUS_SLEEPING

    def kill(self) -> None:
        self.killed = True


def test_a_stopped_rank_is_named_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing answers; one that goes on in time is waited for."""
    clock = iter(range(10**6))
    monkeypatch.setattr("rl.cluster.calls.time.monotonic", lambda: float(next(clock)))
    monkeypatch.setattr("rl.cluster.calls.ray.wait", lambda waiting, timeout: ([], list(waiting)))
    process: Any = Process()
    calls: Any = {"one": Rank("trainer rank 0", None), "other": Rank("trainer rank 1", None, process)}
    with pytest.raises(RunError, match=r"^trainer rank 1 \(pid 4321\) was stopped, .* within cluster.patience=7 s$"):
        gather(calls, patience=7)
    assert process.killed
    process.stopped = False
    with pytest.raises(RunError, match="trainer rank 0 did not answer within 50 s"):
        gather(calls, timeout=50, patience=7)


@pytest.mark.parametrize("asked", [Terminated(15), KeyboardInterrupt(), None])
def test_a_signal_is_heard_while_ray_waits(monkeypatch: pytest.MonkeyPatch, asked: BaseException | None) -> None:
    """Ray makes a SystemError of what a handler raises in its `wait`; any other SystemError stays."""
    error = SystemError("<cyfunction CoreWorker.wait> returned a result with an exception set")

    def wait(*_: object, **__: object) -> None:
        raise error from asked

    monkeypatch.setattr("rl.cluster.calls.ray.wait", wait)
    for waits in (gather, settle):
        with pytest.raises(BaseException) as caught:
            waits({"one": Rank("trainer rank 0", None)})
        assert caught.value is (asked or error)


def test_only_the_tracebacks_of_rays_threads_are_kept_off_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("threading.excepthook", threading.__excepthook__)
    _hush_threads()
    hushed = threading.excepthook
    _hush_threads()
    assert threading.excepthook is hushed
    for name in ("ray_listen_error_messages", "ray.init", "mine"):
        thread = threading.Thread(target=lambda: [][0], name=name)
        thread.start()
        thread.join()
    assert capsys.readouterr().err.count("Traceback") == 1


def test_ray_is_looked_at_before_its_store_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading from the store of a Ray that has ended ends this process without a word."""

    def lost() -> None:
        raise RayLost("it has ended")

    monkeypatch.setattr("rl.cluster.calls.check_ray", lost)
    monkeypatch.setattr("rl.cluster.fleets.check_ray", lost)
    monkeypatch.setattr("rl.cluster.calls.ray.wait", lambda waiting, timeout: (waiting[:1], waiting[1:]))
    for name in ("calls.ray.get", "fleets.ray.put"):
        monkeypatch.setattr(f"rl.cluster.{name}", lambda *_: pytest.fail("the store was used"))
    calls: Any = {"one": Rank("trainer rank 0", None), "other": Rank("trainer rank 1", None)}
    batch: Any = None
    for ask in (partial(gather, calls), partial(TrainerFleet([], []).step, batch, LikelihoodLoss(), 0.0)):
        with pytest.raises(RayLost):
            ask()


def test_replicas_share_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request is served once, completions come in the order of the requests, a prompt stays on one engine."""
    served: list[list[Request]] = []

    class Method:
        def remote(self, share: list[Request]) -> tuple:
            served.append(share)
            done = [
                Completion(r.id, (r.id,), (0.0,), "stop", 0, r.sampling, i) for r in share for i in range(r.sampling.n)
            ]
            return tuple(reversed(done))

    class Actor:
        generate = Method()
        drafts = SimpleNamespace(remote=object)

    monkeypatch.setattr("rl.cluster.fleets.gather", lambda calls, patience: list(calls))
    rng = np.random.default_rng(0)
    prompts = [(int(rng.integers(5)),) for _ in range(7)]
    requests = [Request(10 * i + j, p, SamplingParams(4, n=j + 1)) for i, p in enumerate(prompts) for j in range(3)]
    fleet = RolloutFleet([[Rank(name, Actor())] for name in "abc"], TINY, [Place(HOST)] * 3)
    done = fleet.generate(requests)
    assert [(c.request_id, c.sample) for c in done] == [(r.id, i) for r in requests for i in range(r.sampling.n)]
    assert sorted(r.id for share in served for r in share) == sorted(r.id for r in requests)
    owners = [{r.prompt_ids for r in share} for share in served]
    assert sum(map(len, owners)) == len(set().union(*owners)) == len(set(prompts))


_DRIVER = """
import os, signal, sys
from pathlib import Path
from rl.cluster.family import guarded

with guarded("a tag of nobody", Path(sys.argv[1])):
    {}
"""


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        ("os._exit(1)", 1, True),  # as Ray's own code does where the raylet is lost
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, True),
        ("pass", 0, False),
        ("sys.exit(2)", 2, False),
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_a_driver_that_ends_without_a_word_is_told_of(
    tmp_path: Path, end: str, code: int, told: bool, begun: bool
) -> None:
    """By one line on stderr, which is the last one of the log that the run had begun, if it had."""
    log = tmp_path / "train.log"
    if begun:
        log.write_text("step 1\n")
    ended = subprocess.run(
        [sys.executable, "-c", _DRIVER.format(end), log],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (code, f"samebit: error: {WORDLESS}\n" if told else "")
    assert log.exists() is begun
    if begun:
        first, *more = log.read_text().splitlines()
        assert first == "step 1" and len(more) == told and all(line.endswith(f"stopped: {WORDLESS}") for line in more)
