"""Over loopback and with real clients: answers are the engine's bits."""

import json
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from rollout.engine import Engine
from rollout.pages import PagePool
from rollout.server.bodies import ChatBody, Message
from rollout.server.openai import Chat, Prompt
from rollout.text import decode_all
from tests.rollout.server.client import SOURCE, TEXT, events, expected, last, post
from tests.rollout.server_process import PATIENCE, Server


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
        body = {"prompt": TEXT, "max_tokens": 12, "logprobs": 1, "seed": 42, **asked}
        answer = post(server, "/v1/completions", body)
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
        ({"tags": ["pages"]}, "tags[0]=\\\"pages\\\" must be 'kv_cache' or 'weights'"),
        ({"tags": 3}, "tags=3 must be a valid array"),
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


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_of_generate_ends_as_the_answer(server: Server, n: int) -> None:
    body = {"text": TEXT, "sampling_params": {"max_new_tokens": 9, "n": n, "stop": "zz"}, "return_logprob": True}
    whole = post(server, "/generate", body)
    whole = whole if n > 1 else [whole]
    with server.client().stream("POST", "/generate", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        chunks = events(answer.iter_lines())
    for i, one in enumerate(whole):
        mine = [c for c in chunks if c.get("index", 0) == i]
        assert len(mine) > 1 and all(c["meta_info"]["finish_reason"] is None for c in mine[:-1])
        assert mine[-1]["text"] == one["text"] and mine[-1]["output_ids"] == one["output_ids"]
        assert all(mine[-1]["text"].startswith(c["text"]) for c in mine)
        end, meta = mine[-1]["meta_info"], one["meta_info"]
        assert end["output_token_logprobs"] == meta["output_token_logprobs"]
        assert end["finish_reason"] == meta["finish_reason"]


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
    chat = Chat.__new__(Chat)
    service: Any = SimpleNamespace(source=SOURCE, engine=SimpleNamespace(pool=PagePool(pages, 16)))

    def most(prompt: int, **asked: int) -> int:
        chat.service, chat.body = service, ChatBody(messages=[Message(role="user", content="")], **asked)
        return chat.most(Prompt((1,) * prompt))

    assert most(10 if pages > 1 else 20) == room
    assert most(1, max_tokens=5) == 5 and most(1, max_tokens=5, max_completion_tokens=7) == 7
