"""What is asked of the server, and what the engine would answer."""

import json
from collections.abc import Iterator
from typing import Any

from rollout.engine import Engine
from rollout.sampling import Completion, Request, SamplingParams
from rollout.source import Source
from tests.rollout.server_process import Server

SOURCE = Source.open(None)
JSON = {"content-type": "application/json"}
TEXT = "The quick brown fox jumps over the lazy dog. "


def post(server: Server, path: str, body: Any, status: int = 200) -> Any:
    """With json.dumps, and not json=, which refuses what is no text."""
    answer = server.client().post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code == status, answer.text
    return answer.json()


def expected(local: Engine, text: str, score_from: int | None = None, **params: Any) -> list[Completion]:
    sampling = SamplingParams(**{"max_new_tokens": 12, "stop_ids": SOURCE.end_ids} | params)
    return local.generate([Request(0, tuple(text.encode()), sampling, score_from)])


def events(lines: Iterator[str]) -> list[Any]:
    found = [line.removeprefix("data: ") for line in lines if line]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


def last(server: Server, body: dict) -> dict:
    """The answer, or the last event of its stream."""
    if not body["stream"]:
        return post(server, "/generate", body)
    with server.client().stream("POST", "/generate", json=body) as answer:
        return events(answer.iter_lines())[-1]
