"""Rewards of servers: what is asked, what is tried again, and what is an error."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rl.data import Problem, Source
from rl.data.tokenizer import of_characters
from rl.errors import UserError
from tests.rl.rewards.opening import earned, opened, verdicts

PROBLEMS = [Problem(f"p{i}", f"{i}+0=", (i,), str(i), str(i), {"level": i, "key": "k", "url": "u"}) for i in range(8)]


class Server(ThreadingHTTPServer):
    """Answers with what `answers` says, by the last part of the path, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers["Authorization"]))
        status, answer = self._answer(body)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        match self.path.rpartition("/")[2]:
            case "lengths":
                return 200, {"rewards": [None if c == "?" else len(c) for c in body["completions"]]}
            case "busy":
                return (503, "later") if len(self.server.asked) == 1 else (200, {"rewards": [1.0]})
            case "down":
                return 503, "later"
            case "few":
                return 200, {"rewards": [1.0]}
            case "odd":
                return 200, {"scores": []}
            case "no_json":
                return 200, b"<html>"
            case "completions":
                question = body["messages"][0]["content"]
                right = "Reference answer:\n3" in question and "Response:\n3" in question
                return 200, {"choices": [{"message": {"content": f"SCORE: 9? No.\nSCORE: {int(right)}"}}]}
            case _:
                return 422, {"detail": "no such model"}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(PROBLEMS[:4], PROBLEMS[4:], lambda p, t: float(t == p.answer), of_characters(["0123456789="]))


def test_a_reward_server(source: Source, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request a problem; null is None."""
    monkeypatch.setenv("MY_TOKEN", "secret")
    args = {"url": f"{server.url}/lengths", "key": "MY_TOKEN", "columns": True}
    reward = opened(source, {"function": "http", "args": args})
    found = verdicts(reward, [PROBLEMS[1]] * 3 + PROBLEMS[2:8], ["a", "?", "abc", *"bcdefg"])
    assert [v.reward for v in found] == [1, None, 3] + [1] * 6
    assert len(server.asked) == 7 and {token for _, _, token in server.asked} == {"Bearer secret"}
    first = {
        "prompts": ["1+0="] * 3,
        "completions": ["a", "?", "abc"],
        "level": [1] * 3,
        "key": ["k"] * 3,
        "url": ["u"] * 3,
    }
    assert first in [body for _, body, _ in server.asked]


def test_what_is_tried_again_and_what_is_not(source: Source, server: Server) -> None:
    def of(path: str, **args: Any) -> Any:
        return opened(source, {"function": "http", "args": {"url": f"{server.url}/{path}", "retries": 1} | args})

    assert earned(of("busy"), PROBLEMS[0], "a") == [1] and len(server.asked) == 2
    server.asked.clear()
    with pytest.raises(
        UserError, match=r"the reward http raised ConnectionError: .*/down gave no answer in 2 attempts .*503"
    ):
        earned(of("down"), PROBLEMS[0], "a")
    assert len(server.asked) == 2
    server.asked.clear()
    with pytest.raises(UserError, match=r"/nowhere refused the request \(status 422: .*no such model.*problem 'p0'"):
        earned(of("nowhere"), PROBLEMS[0], "a")
    assert len(server.asked) == 1
    for path, why in (
        ("few", "1 rewards for 2 completions"),
        ("odd", "answered no rewards"),
        ("no_json", "JSONDecodeError"),
    ):
        with pytest.raises(UserError, match=why):
            earned(of(path), PROBLEMS[0], "a", "b")


def test_a_server_that_is_not_there(source: Source) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        slow = {"function": "http", "args": {"url": f"http://127.0.0.1:{port}/", "timeout": 0.3, "retries": 0}}
        with pytest.raises(UserError, match="gave no answer in 1 attempts"):
            earned(opened(source, slow), PROBLEMS[0], "a")
    told: list[str] = []
    reward = opened(source, slow, told.append, errors="drop")
    assert earned(reward, PROBLEMS[0], "a") == [None] and "refused" in told[0]


def test_a_judge(source: Source, server: Server) -> None:
    """Its last word counts; what a completion holds is not filled in."""
    args = {"url": f"{server.url}/v1/", "model": "m"}
    reward = opened(source, {"function": "judge", "args": args})
    assert earned(reward, PROBLEMS[3], "3", "{answer}", "4") == [1, 0, 0]
    path, body, token = server.asked[0]
    assert path == "/v1/chat/completions" and token is None
    assert body["model"] == "m" and body["temperature"] == 0 and "Question:\n3+0=" in body["messages"][0]["content"]
    (verdict,) = verdicts(reward, [PROBLEMS[3]], ["3"])
    assert verdict.notes == {"judge/said": "SCORE: 9? No.\nSCORE: 1"}
    half = opened(source, {"function": "judge", "args": args | {"pattern": r"(\d)\?", "scale": 10}})
    assert earned(half, PROBLEMS[3], "3") == [0.9]
    with pytest.raises(UserError, match="the reward judge raised ValueError: m gave no score: SCORE: 9"):
        earned(opened(source, {"function": "judge", "args": args | {"pattern": "(x)"}}), PROBLEMS[3], "3")
