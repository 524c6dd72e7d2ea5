"""The server and real clients over loopback: answers are the engine's bits, refusals say why, nobody's leaving costs a page."""

import asyncio
import contextlib
import json
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest

from rollout.engine import Engine, EngineConfig
from rollout.pages import PagePool
from rollout.sampling import Completion, Request, SamplingParams
from rollout.scheduler import Limits
from rollout.server.fields import Fields
from rollout.server.openai import Chat
from rollout.source import Source
from rollout.text import decode_all
from tests.rollout.server_process import PATIENCE, Server, running, wait_for

SOURCE = Source.open(None)
TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running("pages=300", "max_running=8", "max_queue=60", "max_body=100000", "prefill_chunk=16") as server:
        yield server


@pytest.fixture(autouse=True)
def healthy(server: Server) -> Iterator[None]:
    """Whatever was asked, the server is alive after it and holds nothing."""
    yield
    wait_for(server.idle, "pages are still held")
    answer = server.client().post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 2}})
    assert answer.status_code == 200 and server.client().get("/health").json() == {"status": "ok"}


@pytest.fixture(scope="module")
def local() -> Engine:
    engine = Engine(SOURCE.config, EngineConfig(200, 16, False, Limits(8, 512, 512)), decode=SOURCE.decode)
    engine.load(SOURCE.weights(), 0)
    return engine


def post(server: Server, path: str, body: Any, status: int = 200) -> Any:
    answer = server.client().post(path, content=json.dumps(body))  # not json=, which refuses what is no text
    assert answer.status_code == status, answer.text
    return answer.json()


def expected(local: Engine, text: str, score_from: int | None = None, **params: Any) -> list[Completion]:
    sampling = SamplingParams(**{"max_new_tokens": 12, "stop_ids": SOURCE.end_ids} | params)
    return local.generate([Request(0, tuple(text.encode()), sampling, score_from)])


def events(lines: Iterator[str]) -> list[Any]:
    found = [line.removeprefix("data: ") for line in lines if line]
    assert found[-1] == "[DONE]"
    return [json.loads(line) for line in found[:-1]]


def test_generate_answers_the_engines_bits(server: Server, local: Engine) -> None:
    params = {"temperature": 0.7, "max_new_tokens": 12, "sampling_seed": 9, "n": 3}
    body = {"text": TEXT, "sampling_params": params, "return_logprob": True, "logprob_start_len": 5, "rid": "mine"}
    body["return_text_in_logprobs"] = True
    answers = post(server, "/generate", body)
    done = expected(local, TEXT, 6, temperature=0.7, seed=9, n=3)
    ids = list(TEXT.encode())
    for answer, c in zip(answers, done, strict=True):
        meta = answer["meta_info"]
        assert answer["output_ids"] == list(c.token_ids)
        assert answer["text"] == decode_all(SOURCE.decode, c.token_ids)
        assert [v[0] for v in meta["output_token_logprobs"]] == list(c.logprobs)
        assert [v[1] for v in meta["output_token_logprobs"]] == list(c.token_ids)
        assert [v[0] for v in meta["input_token_logprobs"]] == [None, *c.prompt_logprobs]
        assert [v[1:] for v in meta["input_token_logprobs"]] == [[i, chr(i)] for i in ids[5:]]
        assert meta["finish_reason"] == {"type": "length", "length": 12}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(ids), 12)
        assert (meta["id"], meta["weight_version"]) == ("mine", "0")


def test_filters(server: Server, local: Engine) -> None:
    """Of both ways to ask; -1 is no limit, as is 0."""
    (done,) = expected(local, TEXT, top_k=20, top_p=0.8, min_p=0.01)
    (free,) = expected(local, TEXT)
    assert done.token_ids != free.token_ids
    filters = {"top_k": 20, "top_p": 0.8, "min_p": 0.01}
    for asked, c in ((filters, done), ({"top_k": -1}, free), ({"top_k": 0, "top_p": 1, "min_p": 0}, free)):
        body = {"text": TEXT, "sampling_params": {"max_new_tokens": 12, **asked}, "return_logprob": True}
        answer = post(server, "/generate", body)
        assert answer["output_ids"] == list(c.token_ids)
        assert [v[0] for v in answer["meta_info"]["output_token_logprobs"]] == list(c.logprobs)
        answer = post(server, "/v1/completions", {"prompt": TEXT, "max_tokens": 12, "logprobs": 1, **asked})
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == list(c.logprobs)


def test_one_client_of_sglangs_deterministic_mode(server: Server) -> None:
    """The body of its own test of determinism: the same seed repeats, in any company; others differ."""
    params = {"temperature": 1.0, "max_new_tokens": 10, "sampling_seed": 42, "frequency_penalty": 0, "top_p": 1.0}
    body = {"text": TEXT, "sampling_params": params, "return_logprob": False, "stream": False}
    first = post(server, "/generate", body)["text"]
    batch = post(server, "/generate", {**body, "text": [TEXT] * 5})
    assert {b["text"] for b in batch} == {first}
    assert batch[0]["meta_info"]["cached_tokens"] > 0
    others = [{**params, "sampling_seed": seed} for seed in (1, 2)]
    mixed = post(server, "/generate", {**body, "text": [TEXT, TEXT], "sampling_params": others})
    assert len({first, mixed[0]["text"], mixed[1]["text"]}) == 3
    ids = post(server, "/generate", {"input_ids": list(TEXT.encode()), "sampling_params": params})
    assert ids["text"] == first and "output_token_logprobs" not in ids["meta_info"]


def test_flush_cache(server: Server) -> None:
    """As SGLang's client of prefix mode calls it between two batches."""
    body = {"text": TEXT * 3, "sampling_params": {"max_new_tokens": 3}}
    first = post(server, "/generate", body)
    assert post(server, "/generate", body)["meta_info"]["cached_tokens"] > 0
    assert server.client().post("/flush_cache").status_code == 200
    again = post(server, "/generate", body)
    assert again["meta_info"]["cached_tokens"] == 0 and again["output_ids"] == first["output_ids"]
    assert server.client().get("/get_model_info").json()["is_generation"]


@pytest.mark.parametrize("tags", [None, ["kv_cache"], ["weights", "kv_cache"]])
def test_memory_is_released_and_resumed(server: Server, tags: list[str] | None) -> None:
    """By SGLang's names; weights that were released are read again, and no bit changes."""
    ask = {"text": TEXT * 3, "sampling_params": {"max_new_tokens": 6}, "return_logprob": True}
    body = {} if tags is None else {"tags": tags}
    first = post(server, "/generate", ask)
    for _ in range(2):
        assert post(server, "/release_memory_occupation", body) == {}
    assert "POST /resume_memory_occupation" in json.dumps(post(server, "/generate", ask, 503))
    answer = server.client().get("/health")
    assert answer.status_code == 503 and answer.json() == {"status": "asleep"}
    for _ in range(2):
        assert post(server, "/resume_memory_occupation", body) == {}
    again = post(server, "/generate", ask)
    assert again["meta_info"]["cached_tokens"] == 0
    assert again["meta_info"]["output_token_logprobs"] == first["meta_info"]["output_token_logprobs"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"tags": ["weights"]}, "are released with"),
        ({"tags": ["pages"]}, "tags has 'pages'"),
        ({"tags": 3}, "a string or a list"),
        ({"level": 1}, "unknown field"),
    ],
)
def test_memory_that_cannot_be_released(server: Server, body: dict, reason: str) -> None:
    assert reason in json.dumps(post(server, "/release_memory_occupation", body, 400))


def test_memory_is_not_released_under_a_request(server: Server) -> None:
    ask = {"text": TEXT, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True, "n": 4}, "stream": True}
    with server.client().stream("POST", "/generate", json=ask) as stream:
        lines = stream.iter_lines()  # closes the stream when it goes
        next(lines)
        assert "in flight" in json.dumps(post(server, "/release_memory_occupation", {}, 409))


def test_default_seed_is_42(server: Server) -> None:
    params = {"max_new_tokens": 6}
    asked = post(server, "/generate", {"text": TEXT, "sampling_params": {**params, "sampling_seed": 42}})
    assert post(server, "/generate", {"text": TEXT, "sampling_params": params})["output_ids"] == asked["output_ids"]
    ids = post(server, "/v1/completions", {"prompt": TEXT, "max_tokens": 6})["choices"][0]["text"]
    assert ids == asked["text"]


def test_stop_text_and_stop_id(server: Server, local: Engine) -> None:
    (free,) = expected(local, TEXT, max_new_tokens=30)
    text = SOURCE.decode(free.token_ids)
    stop = next(text[i : i + 2] for i in range(3, 30) if text[i : i + 2].isascii() and len(text[i : i + 2]) == 2)
    body = {"text": TEXT, "sampling_params": {"max_new_tokens": 30, "stop": [stop, "no such text"]}}
    answer = post(server, "/generate", body)
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == text[: text.index(stop)]
    stop_id = free.token_ids[7]
    at = free.token_ids.index(stop_id)
    answer = post(server, "/generate", {"text": TEXT, "sampling_params": {"stop_token_ids": [stop_id]}})
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop_id}
    assert answer["output_ids"] == list(free.token_ids[: at + 1])
    assert answer["text"] == decode_all(SOURCE.decode, free.token_ids[:at])


def test_what_stopped_a_text_may_stay(server: Server, local: Engine) -> None:
    (free,) = expected(local, TEXT, max_new_tokens=30)
    text = SOURCE.decode(free.token_ids)
    stop = next(text[i : i + 2] for i in range(3, 30) if text[i : i + 2].isascii() and len(text[i : i + 2]) == 2)
    keep = {"max_new_tokens": 30, "no_stop_trim": True}
    for stream in (False, True):
        answer = last(server, {"text": TEXT, "sampling_params": {**keep, "stop": stop}, "stream": stream})
        assert answer["text"] == text[: text.index(stop) + 2]
        stop_id = free.token_ids[7]
        answer = last(
            server, {"text": TEXT, "sampling_params": {**keep, "stop_token_ids": [stop_id]}, "stream": stream}
        )
        assert answer["text"] == decode_all(SOURCE.decode, free.token_ids[: free.token_ids.index(stop_id) + 1])


def test_special_tokens_may_be_text(server: Server, local: Engine) -> None:
    special = next(i for i in range(SOURCE.config.vocab_size) if SOURCE.decode([i]) == "" != SOURCE.decode_special([i]))
    seed, free = next(
        (s, c)
        for s in range(500)
        if special in (c := expected(local, TEXT, max_new_tokens=40, seed=s, stop_ids=())[0]).token_ids
    )
    params = {"max_new_tokens": 40, "sampling_seed": seed, "ignore_eos": True, "skip_special_tokens": False}
    for stream in (False, True):
        answer = last(server, {"text": TEXT, "sampling_params": params, "stream": stream})
        assert answer["output_ids"] == list(free.token_ids)
        assert answer["text"] == decode_all(SOURCE.decode_special, free.token_ids)
        assert SOURCE.decode_special([special]) in answer["text"]


def last(server: Server, body: dict) -> dict:
    """The answer, or the last event of its stream."""
    if not body["stream"]:
        return post(server, "/generate", body)
    with server.client().stream("POST", "/generate", json=body) as answer:
        return events(answer.iter_lines())[-1]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_of_generate_ends_as_the_answer(server: Server, n: int) -> None:
    body = {"text": TEXT, "sampling_params": {"max_new_tokens": 9, "n": n, "stop": "zz"}, "return_logprob": True}
    whole = post(server, "/generate", body)
    whole = whole if n > 1 else [whole]
    with server.client().stream("POST", "/generate", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        chunks = events(answer.iter_lines())
    for i, expected in enumerate(whole):
        mine = [c for c in chunks if c.get("index", 0) == i]
        assert len(mine) > 3 and all(c["meta_info"]["finish_reason"] is None for c in mine[:-1])
        assert mine[-1]["text"] == expected["text"] and mine[-1]["output_ids"] == expected["output_ids"]
        assert all(mine[-1]["text"].startswith(c["text"]) for c in mine)
        last, meta = mine[-1]["meta_info"], expected["meta_info"]
        assert last["output_token_logprobs"] == meta["output_token_logprobs"]
        assert last["finish_reason"] == meta["finish_reason"]


def test_the_openai_client(server: Server, local: Engine) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)
    assert [m.id for m in client.models.list()] == ["tiny"]
    done = expected(local, TEXT, seed=3, n=2)
    answer = client.completions.create(model="tiny", prompt=TEXT, max_tokens=12, seed=3, n=2, logprobs=1)
    for choice, c in zip(answer.choices, done, strict=True):
        assert choice.text == decode_all(SOURCE.decode, c.token_ids) and choice.finish_reason == "length"
        assert choice.logprobs and choice.logprobs.token_logprobs == list(c.logprobs)
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(TEXT), 24)
    pieces = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=TEXT, max_tokens=12, seed=3, n=2, stream=True):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [c.text for c in answer.choices]
    many = client.completions.create(model="tiny", prompt=[TEXT, list(TEXT.encode())], max_tokens=12, seed=3)
    assert [c.text for c in many.choices] == [answer.choices[0].text] * 2


def test_the_openai_client_chats(server: Server, local: Engine) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    (done,) = expected(local, "system: Be brief.\nuser: Hello?\nassistant: ", max_new_tokens=15, seed=8)
    asked: Any = {"model": "tiny", "messages": messages, "seed": 8, "max_completion_tokens": 15, "logprobs": True}
    answer = client.chat.completions.create(**asked)
    (choice,) = answer.choices
    assert choice.message.content == decode_all(SOURCE.decode, done.token_ids) and choice.message.role == "assistant"
    assert choice.logprobs and [t.logprob for t in choice.logprobs.content or []] == list(done.logprobs)
    content, logprobs, usage = "", [], None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for part in chunk.choices:
            content += part.delta.content or ""
            logprobs += [t.logprob for t in (part.logprobs.content if part.logprobs else None) or []]
    assert content == choice.message.content and logprobs == list(done.logprobs)
    assert usage and usage == answer.usage.model_copy(update={"prompt_tokens_details": usage.prompt_tokens_details})


@pytest.mark.parametrize(("pages", "room"), [(4, 54), (300, 1014), (1, 1)])
def test_a_chat_may_take_all_the_room_there_is(pages: int, room: int) -> None:
    """What is left of the model's 1024 positions and of the pages."""
    service: Any = SimpleNamespace(source=SOURCE, engine=SimpleNamespace(pool=PagePool(pages, 16)))
    chat = Chat(service)
    assert chat.most(Fields({}, "the body"), (1,) * 10 if pages > 1 else (1,) * 20) == room
    assert chat.most(Fields({"max_tokens": 5}, "the body"), (1,)) == 5
    assert chat.most(Fields({"max_tokens": 5, "max_completion_tokens": 7}, "the body"), (1,)) == 7


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
    ("/generate", {"input_ids": [1, "a"]}, "a prompt must be a list of integers"),
    ("/generate", {"input_ids": [1.5]}, "a prompt must be a list of integers"),
    ("/generate", {"input_ids": [True]}, "a prompt must be a list of integers"),
    ("/generate", {"input_ids": [288]}, "outside the vocabulary of 288"),
    ("/generate", {"input_ids": [-1]}, "outside the vocabulary of 288"),
    ("/generate", {"input_ids": [10**40]}, "outside the vocabulary of 288"),
    ("/generate", {"text": "\ud800"}, "half of a surrogate pair"),
    ("/generate", {"text": "a", "rid": "\ud800"}, "half of a surrogate pair"),
    ("/v1/chat/completions", {"messages": [{"role": "\ud800", "content": "a"}]}, "half of a surrogate pair"),
    (
        "/generate",
        {"text": "a" * 1000, "sampling_params": {"max_new_tokens": 100}},
        "exceed the model's 1024 positions",
    ),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens=0 must be in 1"),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -4}}, "max_new_tokens=-4 must be in 1"),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": "4"}}, "max_new_tokens must be an integer"),
    ("/generate", {"text": "a", "sampling_params": {"temperature": -1}}, "temperature=-1.0 must be 0 (greedy)"),
    ("/generate", {"text": "a", "sampling_params": {"temperature": 10**400}}, "temperature=inf must be finite"),
    ("/generate", {"text": "a", "sampling_params": {"temperature": 1e300}}, "temperature=1e+300 must be at most"),
    ("/generate", {"text": "a", "sampling_params": {"temperature": "hot"}}, "temperature must be a number"),
    ("/generate", {"text": "a", "sampling_params": {"sampling_seed": -1}}, "sampling_seed=-1 must be in 0"),
    ("/generate", {"text": "a", "sampling_params": {"n": 0}}, "n=0 must be in 1 .. 128"),
    ("/generate", {"text": "a", "sampling_params": {"n": 100}}, "more than the queue of 60"),
    ("/generate", {"text": "a", "sampling_params": {"stop": [1]}}, "stop must be a string or a list of strings"),
    (
        "/generate",
        {"text": "a", "sampling_params": {"stop": "b", "skip_special_tokens": False}},
        "skip_special_tokens=false together with stop texts is not supported: send stop_token_ids",
    ),
    (
        "/generate",
        {"text": "a", "sampling_params": {"stop_token_ids": "a"}},
        "stop_token_ids must be a list of integers",
    ),
    ("/generate", {"text": "a", "sampling_params": {"top_k": -2}}, "top_k=-2 must be in -1"),
    ("/generate", {"text": "a", "sampling_params": {"top_k": 0.5}}, "top_k must be an integer"),
    ("/generate", {"text": "a", "sampling_params": {"top_p": 0}}, "top_p=0.0 must be above 0"),
    ("/generate", {"text": "a", "sampling_params": {"min_p": 1.5}}, "min_p=1.5 must be in 0 .. 1"),
    ("/generate", {"text": "a", "sampling_params": {"min_p": 10**400}}, "min_p=inf must be finite"),
    (
        "/generate",
        {"text": "a", "sampling_params": {"repetition_penalty": 1.2}},
        "repetition_penalty=1.2 is not supported",
    ),
    ("/generate", {"text": "a", "sampling_params": {"beam": 5}}, 'sampling_params has an unknown field "beam"'),
    ("/generate", {"text": "a", "sampling_params": []}, "sampling_params has 0 entries for 1 prompts"),
    ("/generate", {"text": "a", "sampling_params": 3}, "sampling_params must be a JSON object"),
    ("/generate", {"text": "a", "beam": 5}, 'the body has an unknown field "beam"'),
    ("/generate", {"text": "a", "stream": "yes"}, "stream must be true or false"),
    ("/generate", {"text": "a", "return_logprob": 1}, "return_logprob must be true or false"),
    ("/generate", {"text": "a", "return_logprob": True, "logprob_start_len": 2}, "past the prompt of 1 tokens"),
    ("/generate", {"text": "a", "top_logprobs_num": 3}, "top_logprobs_num=3 is not supported"),
    ("/generate", [1], "the body must be a JSON object"),
    ("/v1/completions", {}, "prompt must be a string or a list of integers"),
    ("/v1/completions", {"prompt": {}}, "prompt must be a string or a list of integers"),
    ("/v1/completions", {"prompt": [1, "a"]}, "a prompt must be"),
    ("/v1/completions", {"prompt": "a", "logprobs": 5}, "logprobs=5 must be in 0 .. 1"),
    ("/v1/completions", {"prompt": "a", "echo": True}, "echo=true is not supported"),
    ("/v1/completions", {"prompt": "a", "model": 3}, "model must be a string"),
    ("/v1/chat/completions", {}, "messages must be a list"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content must be text"),
    ("/v1/chat/completions", {"messages": ["a"]}, "messages[0] must be an object with a role"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools="),
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
        (b"[" * 50_000, 400, "the body is nested too deeply"),
        (b'{"text": "a", "sampling_params": {"temperature": NaN}}', 400, "the body holds NaN"),
        (b'{"text": "a", "sampling_params": {"temperature": -Infinity}}', 400, "the body holds -Infinity"),
        (b'{"text": "a", "sampling_params": {"temperature": 1e999}}', 400, "temperature=inf must be finite"),
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

    with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # answered before all was sent
        assert server.client().post("/generate", content=parts()).status_code == 413


def test_paths_and_methods(server: Server) -> None:
    assert "there is no /v2" in post(server, "/v2", {}, 404)["error"]["message"]
    assert server.client().get("/generate").status_code == 405


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_client_that_goes_away_frees_its_pages(server: Server, path: str, stream: bool) -> None:
    aborted = server.metric("aborted_total")
    body: dict[str, Any] = {"stream": stream}
    if path == "/generate":
        body |= {"text": TEXT, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True, "n": 8}}
    else:
        body |= {"prompt": TEXT, "max_tokens": 900, "ignore_eos": True, "n": 8}
    if stream:
        with server.client().stream("POST", path, json=body) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            server.client().post(path, json=body, timeout=httpx.Timeout(PATIENCE, read=0.3))
    wait_for(lambda: server.metric("aborted_total") == aborted + 1, "nobody noticed")
    wait_for(server.idle, "pages are still held")


def test_answers_are_in_the_order_of_the_prompts(server: Server) -> None:
    """Not in that in which they end."""
    params = [{"max_new_tokens": n, "ignore_eos": True} for n in (20, 2, 9)]
    batch = post(server, "/generate", {"text": [TEXT] * 3, "sampling_params": params})
    assert [len(b["output_ids"]) for b in batch] == [20, 2, 9]


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


def test_a_soak_with_random_aborts_leaks_no_page(server: Server) -> None:
    chance = random.Random(0)
    fates: dict[str, int] = {"done": 0, "left": 0, "refused": 0}

    async def one(client: httpx.AsyncClient) -> None:
        prompt = TEXT * chance.randint(1, 3) + chr(97 + chance.randint(0, 25))
        params = {"max_new_tokens": chance.randint(1, 40), "n": chance.randint(1, 3), "ignore_eos": True}
        body = {"text": prompt[chance.randint(0, 5) :], "sampling_params": params, "stream": True}
        body["return_logprob"] = chance.random() < 0.3
        body["logprob_start_len"] = chance.choice([-1, 0, 20])
        leave = chance.random() < 0.5
        async with client.stream("POST", "/generate", json=body) as answer:
            if answer.status_code == 429:
                fates["refused"] += 1
                return
            assert answer.status_code == 200
            async for _ in answer.aiter_lines():
                if leave and chance.random() < 0.2:
                    fates["left"] += 1
                    return
        fates["done"] += 1

    async def soak() -> None:
        limits = httpx.Limits(max_connections=24)
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, limits=limits) as client:
            await asyncio.gather(*(one(client) for _ in range(150)))

    asyncio.run(soak())
    assert fates["done"] > 30 and fates["left"] > 30, fates
    wait_for(server.idle, "pages are still held")


def test_metrics_are_complete(server: Server) -> None:
    post(server, "/generate", {"text": TEXT, "sampling_params": {"max_new_tokens": 4}})
    text = server.client().get("/metrics").text
    for name in ("requests_total", "prompt_tokens_total", "sampled_tokens_total", "waiting", "running", "pages_free"):
        assert f"\nsamebit_{name} " in text, name
    for name in ("time_to_first_token_seconds", "inter_token_seconds", "step_seconds"):
        assert server.metric(f"{name}_count") > 0
    assert server.metric("cache_hit_tokens") > 0 and server.metric("sampled_tokens_total") > 0
