"""Log-probs of what is given: one set of bits, however they are asked for. The engine's own are the trainer's elsewhere."""

import threading
from typing import Any

import openai
import pytest

from rollout.engine import Engine
from rollout.server.words import Words
from rollout.text import decode_all
from tests.rollout.server.client import SOURCE, TEXT, events, expected, post
from tests.rollout.server_process import PATIENCE, Server, wait_for

WORDS = Words(SOURCE)


def as_ids(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_text_scored_has_the_bits_that_it_was_sampled_with(server: Server, temperature: float) -> None:
    """By /generate with no new token, by /v1/completions with echo, with and without a new token."""
    params = {"temperature": temperature, "max_new_tokens": 12, "ignore_eos": True}
    sampled = post(server, "/generate", {"text": TEXT, "sampling_params": params, "return_logprob": True})
    drawn = [v[0] for v in sampled["meta_info"]["output_token_logprobs"]]
    ids = as_ids(TEXT) + sampled["output_ids"]
    body = {"input_ids": ids, "sampling_params": {**params, "max_new_tokens": 0}, "return_logprob": True}
    for start in (0, len(TEXT) - 1):
        scored = post(server, "/generate", {**body, "logprob_start_len": start})
        meta = scored["meta_info"]
        assert [v[0] for v in meta["input_token_logprobs"]][-12:] == drawn
        assert [v[1] for v in meta["input_token_logprobs"]] == ids[start:]
        assert meta["input_token_logprobs"][0][0] is None
        assert (scored["text"], scored["output_ids"], meta["output_token_logprobs"]) == ("", [], [])
        assert (meta["completion_tokens"], meta["finish_reason"]) == (0, {"type": "length", "length": 0})
    for new in (0, 1):
        asked = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": new, "temperature": temperature}
        (choice,) = post(server, "/v1/completions", asked)["choices"]
        logprobs = choice["logprobs"]["token_logprobs"]
        assert logprobs[len(TEXT) : len(ids)] == drawn and logprobs[0] is None and len(logprobs) == len(ids) + new


def test_what_lm_eval_asks(server: Server, local: Engine) -> None:
    """One new token, echo, and the most likely of each place: whether a continuation is greedy is seen from equal floats."""
    (greedy,) = expected(local, TEXT, temperature=0.0, max_new_tokens=5, stop_ids=())
    texts = [as_ids(TEXT) + list(greedy.token_ids), [*as_ids(TEXT), 1, 2, 3, 4, 5]]
    body = {
        "model": "tiny",
        "prompt": texts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = post(server, "/v1/completions", body)["choices"]
    assert [c["index"] for c in choices] == [0, 1]
    for choice, ids, is_greedy in zip(choices, texts, (True, False), strict=True):
        found = choice["logprobs"]
        assert {len(column) for column in found.values()} == {len(ids) + 1}
        places = range(len(TEXT), len(ids))
        hits = [found["token_logprobs"][p] == max(found["top_logprobs"][p].values()) for p in places]
        assert all(hits) == is_greedy
        assert found["top_logprobs"][0] is None
        assert all(found["token_logprobs"][p] in found["top_logprobs"][p].values() for p in range(1, len(ids) + 1))


def test_echo_shows_the_prompt(server: Server, local: Engine) -> None:
    (done,) = expected(local, TEXT, seed=4, max_new_tokens=8)
    after = decode_all(SOURCE.decode, done.token_ids)
    asked = {"prompt": TEXT, "echo": True, "max_tokens": 8, "seed": 4}
    for prompt in (TEXT, as_ids(TEXT)):
        answer = post(server, "/v1/completions", {**asked, "prompt": prompt, "logprobs": 2})
        (choice,) = answer["choices"]
        assert choice["text"] == TEXT + after and answer["usage"]["completion_tokens"] == 8
        offsets = choice["logprobs"]["text_offset"]
        assert offsets[: len(TEXT) + 1] == list(range(len(TEXT) + 1)) and offsets == sorted(offsets)
        assert choice["logprobs"]["token_logprobs"][len(TEXT) :] == list(done.logprobs)
        assert choice["logprobs"]["tokens"][: len(TEXT)] == list(TEXT)
    (choice,) = post(server, "/v1/completions", {**asked, "max_tokens": 0})["choices"]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == (TEXT, "length", None)
    with server.client().stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
        assert "".join(c["choices"][0]["text"] for c in events(answer.iter_lines())) == TEXT + after


def test_the_most_likely_tokens(server: Server) -> None:
    """The same of all three routes; in a stream too."""
    params = {"max_new_tokens": 6, "sampling_seed": 3, "top_k": 4}
    body = {
        "text": TEXT,
        "sampling_params": params,
        "return_logprob": True,
        "top_logprobs_num": 5,
        "logprob_start_len": 40,
    }
    meta = post(server, "/generate", body)["meta_info"]
    tops = meta["output_top_logprobs"]
    assert [len(top) for top in tops] == [4] * 6 and meta["input_top_logprobs"][0] is None
    assert [len(top) for top in meta["input_top_logprobs"][1:]] == [5] * (len(TEXT) - 41)
    for top, drawn in zip(tops, meta["output_token_logprobs"], strict=True):
        assert drawn in top and [v[0] for v in top] == sorted((v[0] for v in top), reverse=True)
    with server.client().stream("POST", "/generate", json={**body, "stream": True}) as answer:
        assert events(answer.iter_lines())[-1]["meta_info"]["output_top_logprobs"] == tops
    asked = {"prompt": TEXT, "max_tokens": 6, "seed": 3, "top_k": 4, "logprobs": 5}
    (choice,) = post(server, "/v1/completions", asked)["choices"]
    names = [f"bytes:{n}" if (n := WORDS.name(v[1])).startswith("\\x") else n for top in tops for v in top]
    assert [n for top in choice["logprobs"]["top_logprobs"] for n in top] == names
    tokens = {"token_ids": as_ids(TEXT), "sampling_params": {"max_tokens": 6, "seed": 3, "top_k": 4, "logprobs": 5}}
    (choice,) = post(server, "/inference/v1/generate", tokens)["choices"]
    content = choice["logprobs"]["content"]
    assert [[[t["logprob"], t["token_id"], None] for t in c["top_logprobs"]] for c in content] == tops


def test_the_openai_client_sees_the_most_likely_tokens_and_true_bytes(server: Server, local: Engine) -> None:
    """Tokens that are a part of a character have its bytes; together they are those of the text."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE, max_retries=0)
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 40, "logprobs": True}
    answer = client.chat.completions.create(**asked, seed=8, top_logprobs=3, extra_body={"ignore_eos": True})
    (choice,) = answer.choices
    (done,) = expected(local, "user: a\nassistant: ", max_new_tokens=40, seed=8, stop_ids=())
    assert choice.logprobs and choice.logprobs.content
    for entry, token in zip(choice.logprobs.content, done.token_ids, strict=True):
        spelled = bytes([token]) if token < 256 else (WORDS.bytes_of(token) or b"")
        assert bytes(entry.bytes or ()) == spelled and len(entry.top_logprobs) == 3
        assert entry.token == (chr(token) if token < 128 else WORDS.name(token))
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)
    assert any(token > 127 for token in done.token_ids), "no part of a character was drawn"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate"])
def test_a_seed_that_is_absent_is_drawn_and_told(server: Server, path: str) -> None:
    asked: dict[str, Any] = {"prompt": TEXT, "max_tokens": 8}
    if "chat" in path:
        asked = {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 8, "logprobs": True}
    if "inference" in path:
        asked = {"token_ids": as_ids(TEXT), "sampling_params": {"max_tokens": 8}}

    def said(answer: dict) -> str:
        (choice,) = answer["choices"]
        return str(choice.get("text") or choice.get("message") or choice["token_ids"])

    answers = [post(server, path, asked) for _ in range(4)]
    seeds = [a["seed"] for a in answers]
    assert len(set(seeds)) == len({said(a) for a in answers}) == 4 and all(0 <= seed < 2**53 for seed in seeds)
    again = {**asked, "seed": seeds[0]}
    if "inference" in path:
        again = {**asked, "sampling_params": {"max_tokens": 8, "seed": seeds[0]}}
    assert said(post(server, path, again)) == said(answers[0])


def test_prompts_of_one_call_draw_seeds_of_their_own(server: Server) -> None:
    """Or share the one that is given."""
    many = {"prompt": [TEXT] * 3, "max_tokens": 8}
    answer = post(server, "/v1/completions", many)
    assert len({c["text"] for c in answer["choices"]}) == 3
    for choice in answer["choices"]:
        again = post(server, "/v1/completions", {"prompt": TEXT, "max_tokens": 8, "seed": choice["seed"]})
        assert again["choices"][0]["text"] == choice["text"]
    answer = post(server, "/v1/completions", {**many, "seed": 7})
    assert len({c["text"] for c in answer["choices"]}) == 1 and {c["seed"] for c in answer["choices"]} == {7}
    with server.client().stream("POST", "/v1/completions", json={**many, "stream": True}) as lines:
        assert len({c["choices"][0]["seed"] for c in events(lines.iter_lines())}) == 3


def test_ids_in_and_ids_out(server: Server, local: Engine) -> None:
    """As vLLM's route, whose clients say more than is needed."""
    (done, other) = expected(local, TEXT, max_new_tokens=30, seed=9, n=2, stop_ids=(7,))
    params = {"max_tokens": 30, "seed": 9, "n": 2, "logprobs": 1, "skip_special_tokens": False, "stop_token_ids": [7]}
    params |= {"ignore_eos": True, "reasoning_effort": "low"}
    body = {"model": "tiny", "token_ids": as_ids(TEXT), "sampling_params": params, "cache_salt": "v1"}
    answer = post(server, "/inference/v1/generate", body)
    for choice, c in zip(answer["choices"], (done, other), strict=True):
        content = choice["logprobs"]["content"]
        assert choice["token_ids"] == list(c.token_ids), "with the token that stopped it"
        assert [e["token"] for e in content] == [f"token_id:{i}" for i in c.token_ids]
        assert [e["logprob"] for e in content] == list(c.logprobs)
        assert choice["finish_reason"] == c.finish_reason
    assert answer["usage"]["total_tokens"] == len(TEXT) + sum(len(c.token_ids) for c in (done, other))
    assert "not served" in post(server, "/inference/v1/generate", {**body, "model": "other"}, 404)["error"]["message"]


LONG = {"max_new_tokens": 900, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("order", [{"rid": "min"}, {"abort_all": True}])
def test_an_aborted_request_is_answered_with_what_it_has(server: Server, order: dict, stream: bool) -> None:
    """`rid` is a beginning; others go on."""
    answers: dict[str, Any] = {}

    def ask(rid: str, **params: Any) -> None:
        body = {"text": TEXT, "rid": rid, "sampling_params": {**LONG, **params}, "stream": stream}
        if not stream:
            answers[rid] = post(server, "/generate", body)
            return
        with server.client().stream("POST", "/generate", json=body) as lines:
            answers[rid] = events(lines.iter_lines())[-1]

    before = server.metric("sampled_tokens_total")
    threads = [threading.Thread(target=ask, args=("mine",)), threading.Thread(target=ask, args=("other",))]
    for thread in threads:
        thread.start()
    wait_for(lambda: server.metric("running") == 2 and server.metric("sampled_tokens_total") > before + 4, "none ran")
    assert post_empty(server, "/abort_request", order) == b""
    threads[0].join(PATIENCE)
    mine = answers["mine"]
    assert mine["meta_info"]["finish_reason"] == {"type": "abort", "message": "aborted by /abort_request"}
    assert 0 < len(mine["output_ids"]) < 900 == 900
    threads[1].join(PATIENCE)
    kind, count = answers["other"]["meta_info"]["finish_reason"]["type"], len(answers["other"]["output_ids"])
    assert (kind == "abort") == ("abort_all" in order) and (count == 900) == (kind == "length")
    assert answers["other"]["output_ids"][: len(mine["output_ids"])] == mine["output_ids"][:count]


def post_empty(server: Server, path: str, body: dict) -> bytes:
    answer = server.client().post(path, json=body)
    assert answer.status_code == 200
    return answer.content


def test_an_abort_of_nothing_is_nothing(server: Server) -> None:
    assert post_empty(server, "/abort_request", {"rid": "nobody"}) == b""


def test_what_the_server_says_of_itself(server: Server) -> None:
    for path in ("/server_info", "/get_server_info"):
        info = server.client().get(path).json()
        assert (info["model_path"], info["tp"], info["max_running"], info["pages"]) == ("tiny", 1, 8, 300)
        assert (info["dtype"], info["leaves"], info["weight_version"]) == ("float32", 8, "0")
        assert "api_key" not in info and info["internal_states"][0]["in_flight"] == 0
    assert server.client().get("/model_info").json() == server.client().get("/get_model_info").json()


def test_health_generate_asks_the_engine(server: Server) -> None:
    """A token of its own, where nothing runs; with the memory released it does not."""
    sampled = server.metric("sampled_tokens_total")
    assert server.client().get("/health_generate").json() == {"status": "ok"}
    assert server.metric("sampled_tokens_total") == sampled + 1
    ask = {"text": TEXT, "sampling_params": {**LONG, "n": 8}, "stream": True}
    with server.client().stream("POST", "/generate", json=ask) as stream:
        lines = stream.iter_lines()  # closes the stream when it goes
        next(lines)
        assert server.client().get("/health_generate").status_code == 200
    wait_for(server.idle, "pages are still held")
    post(server, "/release_memory_occupation", {})
    assert server.client().get("/health_generate").status_code == 503
    post(server, "/resume_memory_occupation", {})
    assert server.client().get("/health_generate").status_code == 200


def test_the_document_names_every_route_and_body(server: Server) -> None:
    document = server.client().get("/openapi.json").json()
    bodies = {}
    for path, methods in document["paths"].items():
        for method in methods.values():
            if "requestBody" in method:
                bodies[path] = method["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert set(bodies) == {
        *("/generate", "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"),
        *("/abort_request", "/flush_cache", "/release_memory_occupation", "/resume_memory_occupation"),
    }
    assert {"/health", "/health_generate", "/metrics", "/v1/models", "/model_info", "/server_info"} < set(
        document["paths"]
    )
    schemas = document["components"]["schemas"]

    def check(value: Any) -> None:
        """Every reference in it leads somewhere."""
        if isinstance(value, dict):
            if "$ref" in value:
                assert value["$ref"].rpartition("/")[2] in schemas, value
            for part in value.values():
                check(part)
        elif isinstance(value, list):
            for part in value:
                check(part)

    check(document)
    generate = schemas[bodies["/generate"]]["properties"]
    assert {"text", "input_ids", "sampling_params", "top_logprobs_num"} <= set(generate)
    assert schemas["NativeSampling"]["properties"]["frequency_penalty"]["const"] == 0.0
