"""What cannot be answered is told why, in the words of the client that asked."""

import asyncio
import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.rollout.server.client import TEXT, post
from tests.rollout.server_process import PATIENCE, Server


def test_the_openai_client_hears_why(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)
    with pytest.raises(openai.BadRequestError, match=r"top_p=1.5 must be above 0 and at most 1"):
        client.completions.create(model="tiny", prompt="a", top_p=1.5)
    with pytest.raises(openai.BadRequestError, match=r"presence_penalty=0.5 is not supported"):
        client.completions.create(model="tiny", prompt="a", presence_penalty=0.5)
    with pytest.raises(openai.NotFoundError, match="model 'gpt-5' is not served; served: 'tiny'"):
        client.completions.create(model="gpt-5", prompt="a")


OK = {"max_new_tokens": 2}
BAD: list[tuple[str, Any, str]] = [
    ("/generate", {}, "send either text or input_ids"),
    ("/generate", {"text": "a", "input_ids": [1]}, "send either text or input_ids"),
    ("/generate", {"text": ""}, "the prompt is empty"),
    ("/generate", {"input_ids": []}, "the prompt is empty"),
    ("/generate", {"text": []}, "text holds 0 prompts"),
    ("/generate", {"text": 7}, "text must be a string"),
    ("/generate", {"input_ids": "a"}, "input_ids must be a list of integers"),
    ("/generate", {"input_ids": [1, "a"]}, 'input_ids must be a list of integers, or a list of such, not "a"'),
    ("/generate", {"input_ids": [1.5]}, "input_ids must be a list of integers"),
    ("/generate", {"input_ids": [True]}, "input_ids must be a list of integers"),
    ("/generate", {"input_ids": [[1], 2]}, "input_ids must be a list of integers"),
    ("/generate", {"input_ids": [288]}, "outside the vocabulary of 288"),
    ("/generate", {"input_ids": [-1]}, "outside the vocabulary of 288"),
    ("/generate", {"input_ids": [10**40]}, "outside the vocabulary of 288"),
    ("/generate", {"text": "\ud800"}, "the body is not JSON: unexpected end of hex escape"),
    ("/generate", {"text": "a", "rid": "\ud800"}, "the body is not JSON: unexpected end of hex escape"),
    ("/generate", {"text": "a", "rid": "r" * 201}, "rid must be a string of at most 200 characters"),
    ("/generate", {"text": ["a"] * 3, "rid": ["a", "b"]}, "rid has 2 entries for 3 prompts"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "\udc00", "content": "a"}]},
        "the body is not JSON: lone leading surrogate",
    ),
    (
        "/generate",
        {"text": "a" * 1000, "sampling_params": {"max_new_tokens": 100}},
        "exceed the model's 1024 positions",
    ),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -4}}, "max_new_tokens=-4 must be greater"),
    (
        "/generate",
        {"text": "a", "sampling_params": {"max_new_tokens": "4"}},
        'max_new_tokens="4" must be a valid integer',
    ),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 10**40}}, "exceed the model's 1024 positions"),
    ("/generate", {"text": "a", "sampling_params": {"temperature": -1}}, "temperature=-1.0 must be 0 (greedy)"),
    ("/generate", {"text": "a", "sampling_params": {"temperature": 10**400}}, "must be a valid number"),
    ("/generate", {"text": "a", "sampling_params": {"temperature": 1e300}}, "temperature=1e+300 must be at most"),
    ("/generate", {"text": "a", "sampling_params": {"temperature": "hot"}}, 'temperature="hot" must be a valid number'),
    (
        "/generate",
        {"text": "a", "sampling_params": {"sampling_seed": -1}},
        "sampling_seed=-1 must be greater than",
    ),
    ("/generate", {"text": "a", "sampling_params": {"n": 0}}, "n=0 must be in 1 .. 128"),
    ("/generate", {"text": "a", "sampling_params": {"n": 100}}, "more than the queue of 60"),
    ("/generate", {"text": "a", "sampling_params": {"stop": [1]}}, "stop[0]=1 must be a valid string"),
    ("/generate", {"text": "a", "sampling_params": {"stop": ["a"] * 17}}, "stop: List should have at most 16 items"),
    ("/generate", {"text": "a", "sampling_params": {"stop": "a" * 1025}}, "stop[0]: String should have at most 1024"),
    (
        "/generate",
        {"text": "a", "sampling_params": {"stop": "b", "skip_special_tokens": False}},
        "skip_special_tokens=false together with stop texts is not supported: send stop_token_ids",
    ),
    (
        "/generate",
        {"text": "a", "sampling_params": {"stop_token_ids": "a"}},
        'stop_token_ids="a" must be a valid array',
    ),
    ("/generate", {"text": "a", "sampling_params": {"top_k": -2}}, "top_k=-2 must be -1, 0 (no limit) or"),
    ("/generate", {"text": "a", "sampling_params": {"top_k": 0.5}}, "top_k=0.5 must be a valid integer"),
    ("/generate", {"text": "a", "sampling_params": {"top_p": 0}}, "top_p=0.0 must be above 0"),
    ("/generate", {"text": "a", "sampling_params": {"min_p": 1.5}}, "min_p=1.5 must be in 0 .. 1"),
    ("/generate", {"text": "a", "sampling_params": {"min_p": 10**400}}, "must be a valid number"),
    (
        "/generate",
        {"text": "a", "sampling_params": {"repetition_penalty": 1.2}},
        "repetition_penalty=1.2 is not supported",
    ),
    ("/generate", {"text": "a", "sampling_params": {"beam": 5}}, 'sampling_params has an unknown field "beam"'),
    ("/generate", {"text": "a", "sampling_params": []}, "sampling_params has 0 entries for 1 prompts"),
    ("/generate", {"text": "a", "sampling_params": 3}, "sampling_params must be a JSON object"),
    ("/generate", {"text": "a", "beam": 5}, 'the body has an unknown field "beam"'),
    ("/generate", {"text": "a", "stream": "yes"}, 'stream="yes" must be a valid boolean'),
    ("/generate", {"text": "a", "return_logprob": 1}, "return_logprob[0]=1 must be a valid boolean"),
    ("/generate", {"text": "a", "return_logprob": True, "logprob_start_len": 2}, "past the prompt of 1 tokens"),
    ("/generate", {"text": "a", "top_logprobs_num": 21}, "top_logprobs_num=21 in 0 .. 20"),
    ("/generate", {"text": "a", "token_ids_logprob": [3]}, "token_ids_logprob=a list of 1 is not supported"),
    ("/generate", [1], "the body must be a JSON object"),
    ("/v1/completions", {}, "prompt must be a string or a list of integers"),
    ("/v1/completions", {"prompt": {}}, "prompt must be a string or a list of integers"),
    ("/v1/completions", {"prompt": [1, "a"]}, "prompt must be a string or a list of integers, or a list of such"),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}, "logprobs=21 must be less than or equal to 20"),
    (
        "/v1/completions",
        {"prompt": "a", "echo": True, "logprobs": 0, "stream": True},
        "echo=true with logprobs is not streamed",
    ),
    ("/v1/completions", {"prompt": [-1], "echo": True}, "outside the vocabulary of 288"),
    ("/v1/completions", {"prompt": [[1], [2**70]], "echo": True, "logprobs": 1}, "outside the vocabulary of 288"),
    ("/v1/completions", {"prompt": "a", "model": 3}, "model=3 must be a valid string"),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, "max_tokens=-1 must be greater than or equal to 0"),
    (
        "/v1/completions",
        {"prompt": "a", "stream_options": {"usage": True}},
        'stream_options has an unknown field "usage"',
    ),
    ("/v1/chat/completions", {}, "messages is missing"),
    ("/v1/chat/completions", {"messages": []}, "messages: List should have at least 1 item"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    ("/v1/chat/completions", {"messages": ["a"]}, "a message must be a JSON object"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content=a list of 1 must be a valid string",
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools="),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tokenize": True}},
        "an object of the template's own arguments",
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
        "needs logprobs=true",
    ),
    ("/inference/v1/generate", {}, "token_ids is missing"),
    ("/inference/v1/generate", {"token_ids": []}, "the prompt is empty"),
    ("/inference/v1/generate", {"token_ids": [300]}, "outside the vocabulary of 288"),
    ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"presence_penalty": 1}}, "presence_penalty=1 is"),
    ("/abort_request", {}, "send rid, the beginning of those to abort, or abort_all=true"),
]


@pytest.mark.parametrize(("path", "body", "reason"), BAD, ids=[f"{p} {r}" for p, _, r in BAD])
def test_a_bad_request_is_told_why(server: Server, path: str, body: Any, reason: str) -> None:
    error = post(server, path, body, 400)["error"]
    assert reason in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and error["code"] == 400


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "the body is not JSON"),
        (b"{", 400, "the body is not JSON"),
        (b"\xff\xfe\xfa", 400, "the body is not JSON"),
        (b"[" * 50_000, 400, "the body is not JSON: recursion limit exceeded"),
        (b'{"text": "a", "sampling_params": {"temperature": NaN}}', 400, "temperature=NaN must be a finite number"),
        (
            b'{"text": "a", "sampling_params": {"temperature": -Infinity}}',
            400,
            "temperature=-Infinity must be a finite number",
        ),
        (
            b'{"text": "a", "sampling_params": {"temperature": 1e999}}',
            400,
            "temperature=Infinity must be a finite number",
        ),
        (b'{"input_ids": [' + b"9" * 9000 + b"]}", 400, "the body is not JSON"),
        (b'{"text": "' + b"a" * 200_000 + b'"}', 413, "the body is larger than 100000 bytes"),
    ],
    ids=["empty", "half", "no text", "deep", "NaN", "infinity", "overflow", "digits", "huge"],
)
def test_a_bad_body_is_told_why(server: Server, body: bytes, status: int, reason: str) -> None:
    for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
        answer = server.client().post(path, content=body)
        if path == "/generate" or reason.startswith("the body"):
            assert answer.status_code == status and reason in answer.json()["error"]["message"], answer.text
        assert 400 <= answer.status_code < 500


def test_a_huge_body_without_a_length(server: Server) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b"a" * 10_000

    assert server.client().post("/generate", content=parts()).status_code == 413


def test_a_client_that_sends_all_before_it_reads_is_told(server: Server) -> None:
    """As urllib does: 20 MB, far more than the sockets hold."""
    address = urlsplit(str(server.client().base_url))
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    connection.request("POST", "/generate", body=b"a" * 20_000_000)
    assert connection.getresponse().status == 413
    connection.close()


def test_paths_and_methods(server: Server) -> None:
    assert "there is no /v2" in post(server, "/v2", {}, 404)["error"]["message"]
    assert server.client().get("/generate").status_code == 405


def test_one_more_than_the_queue_is_refused(server: Server) -> None:
    ask: dict[str, Any] = {"text": TEXT, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True, "n": 60}}
    with server.client().stream("POST", "/generate", json={**ask, "stream": True}) as stream:
        lines = stream.iter_lines()  # closes the stream when it goes
        next(lines)
        ask["sampling_params"]["n"] = 1
        assert "60 samples are in flight, of at most 60" in json.dumps(post(server, "/generate", ask, 429))


def test_overload_is_answered_at_once(server: Server) -> None:
    """429 beyond the queue, and those who wait are served."""

    async def crowd() -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
            params = {"max_new_tokens": 150, "ignore_eos": True, "n": 10}
            body = {"text": TEXT, "sampling_params": params}
            answers = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(12)))
        assert all(a.headers["retry-after"] for a in answers if a.status_code == 429)
        return [a.status_code for a in answers]

    codes = asyncio.run(crowd())
    assert set(codes) == {200, 429} and codes.count(200) >= 6
