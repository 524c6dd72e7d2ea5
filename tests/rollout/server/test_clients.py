"""Clients that go away, and many at once: nobody's leaving costs a page, and the metrics tell."""

import asyncio
import random
from typing import Any

import httpx
import pytest

from tests.rollout.server.client import TEXT, post
from tests.rollout.server_process import PATIENCE, Server, wait_for


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
