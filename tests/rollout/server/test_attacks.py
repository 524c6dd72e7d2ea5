"""What would stop a server for all its clients, and web pages that reach for it."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from rollout.server.connections import Once, quiet
from rollout.server.gate import Gate
from tests.rollout.server.client import JSON, TEXT, post
from tests.rollout.server_process import PATIENCE, Server, running, wait_for

CONNECTIONS = 40


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("max_running=8", f"max_connections={CONNECTIONS}", "header_seconds=4", "body_seconds=4") as server:
        yield server


def longest_wait(server: Server, thread: threading.Thread) -> float:
    """Seconds, of requests for /health while it runs."""
    thread.start()
    worst = 0.0
    while thread.is_alive():
        begin = time.monotonic()
        assert server.client().get("/health").status_code == 200
        worst = max(worst, time.monotonic() - begin)
        time.sleep(0.01)
    return worst


STOPS = ["a" * 1000 + last for last in "bcdefghijklmnopq"]


@pytest.mark.parametrize("stream", [False, True])
def test_long_stop_texts_stop_nobody(server: Server, stream: bool) -> None:
    """16 of them, 8 samples of 1,000 tokens: this took the event loop for 26 seconds."""
    params = {"max_new_tokens": 1000, "ignore_eos": True, "n": 8, "stop": STOPS}
    answers: list[httpx.Response] = []
    body = {"text": "x", "sampling_params": params, "stream": stream}
    thread = threading.Thread(target=lambda: answers.append(server.client().post("/generate", json=body)))
    assert longest_wait(server, thread) < 10
    assert answers[0].status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_long_bodies_stop_nobody_and_take_little_memory(server: Server, path: str) -> None:
    """15 MB: of text, for which a tokenizer takes 3 GB, and of keys, which took the event loop for seconds."""

    def memory() -> int:
        """Most that the process ever had, in KiB."""
        with open(f"/proc/{server.process.pid}/status") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    before, text = memory(), "ab c" * 3_900_000
    whole: dict[str, Any] = {"text": text} if path == "/generate" else {"messages": [{"role": "user", "content": text}]}
    keys = b"{" + b",".join(b'"k%d":1' % i for i in range(1_200_000)) + b"}"
    for body, status in ((json.dumps(whole).encode(), 400), (keys, 413)):
        answers: list[httpx.Response] = []
        ask = {"content": body, "headers": JSON}
        thread = threading.Thread(target=lambda ask=ask, to=answers: to.append(server.client().post(path, **ask)))
        assert longest_wait(server, thread) < 10
        assert answers[0].status_code == status, answers[0].text
    assert memory() - before < 500 * 1024


HALF = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nX-half: "


def connect(server: Server, sent: bytes) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=PATIENCE)
    made.sendall(sent)
    return made


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return connection.recv(1 << 16) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_half_sent_requests_hold_nothing_for_ever(server: Server) -> None:
    """More of them than connections are allowed: others are answered, a stream that runs goes on, the log stays short."""
    lines = len(server.lines)
    ask = {"text": TEXT, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}, "stream": True}
    with server.client().stream("POST", "/generate", json=ask) as stream, contextlib.ExitStack() as held:
        events = stream.iter_lines()
        next(events)
        halves = [held.enter_context(connect(server, HALF)) for _ in range(3 * CONNECTIONS)]
        body = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{"
        halves += [held.enter_context(connect(server, body)) for _ in range(CONNECTIONS)]
        for _ in range(3):
            with server.client(headers={"connection": "close"}) as fresh:
                assert fresh.get("/health").status_code == 200
        assert list(events)[-2] == "data: [DONE]"
        wait_for(lambda: all(map(is_closed, halves)), "a half-sent request is still held")
    assert len(server.lines) - lines < 10, server.lines[lines:]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        HALF,
        b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" + HALF,
    ],
    ids=["nothing", "headers", "a body", "a body nobody reads", "the second request"],
)
def test_what_trickles_has_an_end(server: Server, sent: bytes) -> None:
    """A byte now and then is no reason to wait longer."""
    with connect(server, sent) as connection:

        def ended() -> bool:
            with contextlib.suppress(OSError):
                connection.sendall(b"a")
            return is_closed(connection)

        wait_for(ended, "it is still held")


def test_a_request_for_which_there_is_no_connection_is_told() -> None:
    """Where all are at work, nobody is thrown out."""
    ask = {"text": TEXT, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}, "stream": True}
    with running("max_connections=1") as server, server.client().stream("POST", "/generate", json=ask) as stream:
        events = stream.iter_lines()
        next(events)
        with server.client(headers={"connection": "close"}) as other:
            refused = other.get("/health")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert list(events)[-2] == "data: [DONE]"


def test_few_open_files_are_enough(server: Server) -> None:
    """The limit of the system is kept away from, and said."""
    with running(shell="ulimit -n 256") as small, contextlib.ExitStack() as held:
        assert "connections, not 2048: the system allows no more open files" in "".join(small.lines)
        for _ in range(320):
            held.enter_context(connect(small, HALF))
        assert small.client().get("/health").status_code == 200
        assert "Too many open files" not in "".join(small.lines)


def test_a_log_is_not_filled(server: Server) -> None:
    """By what a client can do again and again."""
    lines = len(server.lines)
    for _ in range(100):
        with connect(server, b"no request at all\r\n\r\n") as garbage:
            wait_for(lambda garbage=garbage: is_closed(garbage), "it was not refused")
    assert len(server.lines) - lines <= 5, server.lines[lines:]


def test_what_goes_wrong_in_the_loop_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> None:
        loop = asyncio.get_running_loop()
        quiet(loop)
        for _ in range(2000):
            loop.call_exception_handler(
                {"message": "accept()\nsocket: <1>", "exception": OSError(24, "Too many open files")}
            )
        loop.call_exception_handler({"message": "another"})

    asyncio.run(fail())
    expected = ["accept(): OSError: [Errno 24] Too many open files", "another"]
    assert capsys.readouterr().err.splitlines() == [f"samebit: error: {line}" for line in expected]


def test_a_message_comes_again_after_a_while() -> None:
    once = Once(seconds=0.0)
    assert once.fresh("a") and once.fresh("a")
    once = Once()
    assert once.fresh("a") and once.fresh("b") and not once.fresh("a")


CHANGES = ["/flush_cache", "/release_memory_occupation", "/resume_memory_occupation", "/abort_request"]
PAGE = {"origin": "http://evil.example"}


@pytest.mark.parametrize("path", [*CHANGES, "/generate", "/v1/completions"])
def test_a_page_of_another_site_cannot_post(server: Server, path: str) -> None:
    for headers in ({**PAGE, **JSON}, {**PAGE, "content-type": "text/plain"}, PAGE, {"origin": "null"}):
        answer = server.client().post(path, content=b"{}", headers=headers)
        assert answer.status_code == 403 and "another site" in answer.json()["error"]["message"]
    other_port = {"origin": "http://127.0.0.1:1", **JSON}
    assert server.client().post(path, content=b"{}", headers=other_port).status_code == 403
    assert server.client().options(path, headers={**PAGE, "access-control-request-method": "POST"}).status_code == 403


@pytest.mark.parametrize("path", CHANGES)
def test_what_changes_the_server_is_json(server: Server, path: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp"):
        answer = server.client().post(path, content=b'{"abort_all": true}', headers={"content-type": kind})
        assert answer.status_code == 415 and "send Content-Type: application/json" in answer.json()["error"]["message"]
    assert server.client().post(path, content=b'{"abort_all": true}').status_code == 415, "a body of no type"
    assert server.client().post(path, content=iter([b"{}"])).status_code == 415
    assert server.client().get(path).status_code == 405, "a GET changes nothing"
    answer = server.client().post(
        path, content=b'{"rid": "x"}', headers={"content-type": "application/json; charset=utf-8"}
    )
    assert answer.status_code in (200, 400)


def test_a_post_without_a_body_has_no_type(server: Server) -> None:
    """As SGLang's clients send some; a page's form has a type, and its script an origin."""
    assert server.client().post("/flush_cache").status_code == 200
    assert server.client().post("/flush_cache", headers={"content-type": "text/plain"}).status_code == 415


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "", "[::1", "10.1.2.3"]
)
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/generate", "/flush_cache"])
def test_a_server_of_another_name_is_not_this_one(server: Server, path: str, host: str) -> None:
    """A name that somebody points to this address, after his page was read."""
    headers = {"host": host.format(port=server.url.rpartition(":")[2]), **JSON}
    answer = server.client().post(path, content=b"{}", headers=headers)
    assert answer.status_code == 421 and "is no name of this server" in answer.json()["error"]["message"]


def test_names_of_its_own(server: Server) -> None:
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1", f"127.0.0.1:{server.url.rpartition(':')[2]}"):
        assert server.client().get("/health", headers={"host": host}).status_code == 200
    with running("names=inside.example,Other.example") as named:
        for host in ("inside.example:30000", "other.example"):
            assert named.client().get("/health", headers={"host": host}).status_code == 200
            body = post(named, "/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1}})
            assert len(body["output_ids"]) == 1
        assert named.client().get("/health", headers={"host": "evil.example"}).status_code == 421


def passes(gate: Gate, client: str, path: str, method: str = "POST", **headers: str) -> int:
    """The status that it answers with; 0: it lets the request through."""
    told: list[int] = []
    pairs = {"host": "10.0.0.5:30000", **{k.replace("_", "-"): v for k, v in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in pairs.items()],
        "client": (client, 5000),
        "server": ("10.0.0.5", 30000),
    }

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            told.append(message["status"])

    asyncio.run(gate(scope, None, send))  # type: ignore[arg-type]
    return told[0] if told else 0


async def inside(scope: Any, receive: Any, send: Any) -> None: ...


@pytest.mark.parametrize("client", ["10.0.0.7", "127.0.0.1", "::1", "::ffff:127.0.0.1", "fe80::1%eth0"])
def test_from_elsewhere_a_change_takes_a_key(client: str) -> None:
    local = client not in ("10.0.0.7", "fe80::1%eth0")
    changes = frozenset({"/flush_cache"})
    free = Gate(inside, frozenset({"localhost"}), None, changes)
    assert passes(free, client, "/flush_cache") == (0 if local else 403)
    assert passes(free, client, "/generate") == 0 and passes(free, client, "/health", "GET") == 0
    keyed = Gate(inside, frozenset({"localhost"}), "secret", changes)
    for path in ("/flush_cache", "/generate"):
        assert passes(keyed, client, path) == 401
        assert passes(keyed, client, path, authorization="Bearer secret") == 0
        assert passes(keyed, client, path, authorization="Bearer sécret") == 401
    assert passes(keyed, client, "/health", "GET") == 0
    assert passes(Gate(inside, frozenset("*"), None, changes), "127.0.0.1", "/flush_cache", host="anything") == 0
