"""The command: its arguments, its limits, how it ends, and several ranks behind it."""

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from kernels.gpu.card import chosen_family
from kernels.model import costs
from kernels.model.known import QWEN3_8B
from kernels.weights.files import save
from rollout.arguments import ArgumentError
from rollout.capacity import ENGINE_PROCESS, serving_bytes
from rollout.scheduler import Limits
from rollout.serve import ServeConfig, main
from rollout.server.bodies import BadRequest
from rollout.server.metrics import Metrics
from rollout.server.service import Service, ServiceLimits
from rollout.source import Source
from tests.rollout.server_process import PATIENCE, Server, running, wait_for

LONG = {"text": "x", "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True, "n": 4}}
SHORT = {"text": "some text", "sampling_params": {"max_new_tokens": 20, "n": 2}, "return_logprob": True}


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("tp", "'tp' is not of the form key=value"),
        ("tpp=2", "unknown key 'tpp'; keys: model, adapter, tp,"),
        ("tp=two", "tp=two must be an integer"),
        ("tp=3", "tp=3 must be a power of two"),
        ("tp=16", "tp=16 is more than leaves=8: set leaves to at least 16"),
        ("tp=", "tp= is empty"),
        ("api_key=", "api_key= is empty: leave it out, or say api_key=null"),
        ("port=70000", "port=70000 must be at most 65535"),
        ("grace_seconds=nan", "grace_seconds=nan must be at least 0"),
        ("prefix_cache=1", "prefix_cache=1 must be true or false"),
        ("model=/nowhere", "/nowhere/config.json does not exist"),
        ("dtype=int8", "dtype=int8 must be auto, float32 or bfloat16"),
        ("device=tpu", "device=tpu must be auto, cpu or cuda"),
        ("threads=1000000", "threads=1000000 must be at most 512"),
        ("host=a..b", "host=a..b: encoding with 'idna' codec failed"),
        ("pages=100000000000", "100000000000 pages of 0.0 MiB do not fit in the"),
        ("max_running=1000000000", "logits of 1000000000 samples"),
    ],
)
def test_a_bad_argument_is_one_line(argument: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([argument])
    error = capsys.readouterr().err
    assert end.value.code == 2 and reason in error
    assert error.startswith("samebit: error: ") and error.count("\n") == 1


def test_a_port_in_use_is_told_before_the_weights_are_read(plain: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([f"port={plain.url.rpartition(':')[2]}"])
    assert end.value.code == 2 and "Address already in use" in capsys.readouterr().err


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "grace_seconds=30.0" in capsys.readouterr().out


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with running("max_running=4", "grace_seconds=600") as server:
        yield server


def bits(answers: list) -> list:
    return [(a["output_ids"], a["text"], a["meta_info"]["output_token_logprobs"]) for a in answers]


def test_batches_are_as_large_as_the_device_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source.open(None)
    assert ServeConfig(device="cpu").engine(source).limits == Limits(64, 2048, 512)
    assert ServeConfig(device="cpu", max_batch_tokens=7).engine(source).limits == Limits(64, 7, 2)
    monkeypatch.setattr("rollout.serve._device", lambda asked, family: asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (80 << 30, 80 << 30))
    assert ServeConfig(device="cuda").engine(source).limits == Limits(256, 8192, 8192)
    assert ServeConfig(device="cuda", prefill_chunk=9).engine(source).limits == Limits(256, 8192, 9)


def test_pages_take_no_more_than_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written at the start, so that pages for 64 texts of 2,048 tokens of a model of 8B would end a laptop."""
    monkeypatch.setattr("rollout.serve.available_memory", lambda: 24 * 2**30)
    source = replace(Source.open(None), config=QWEN3_8B, dtype=torch.bfloat16)
    weights = 2 * costs.parameter_count(QWEN3_8B)
    for tp in (1, 2):
        config = ServeConfig(device="cpu", tp=tp).engine(source)
        taken = weights + config.pages * config.page_size * costs.token_bytes(QWEN3_8B, 1, 2)
        taken += tp * (serving_bytes(QWEN3_8B, config.limits, tp, 2) + ENGINE_PROCESS)
        assert 0.79 * 24 * 2**30 < taken <= 0.8 * 24 * 2**30
    assert ServeConfig(device="cpu", pages=1000).engine(source).pages == 1000
    with pytest.raises(
        ArgumentError, match=r"15.3 GiB of weights.* and 9000 pages of 2.2 MiB do not fit in the 24.0 GiB"
    ):
        ServeConfig(device="cpu", pages=9000).engine(source)
    monkeypatch.setattr("rollout.serve.available_memory", lambda: 15 * 2**30)
    with pytest.raises(ArgumentError, match=r"and 1 pages of 2.2 MiB do not fit in the 15.0 GiB"):
        ServeConfig(device="cpu").engine(source)
    monkeypatch.setattr("rollout.serve.available_memory", lambda: 0)  # unknown
    assert ServeConfig(device="cpu").engine(source).pages * 16 == 64 * 2048


def test_pages_take_what_a_card_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    source = replace(Source.open(None), config=QWEN3_8B, dtype=torch.bfloat16)
    free = [80 << 30] * 8
    monkeypatch.setattr("rollout.serve._device", lambda asked, family: asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (free[card], 80 << 30))

    def tokens(tp: int = 1, **keys: Any) -> int:
        config = ServeConfig(device="cuda", tp=tp, **keys).engine(source)
        return config.pages * config.page_size

    beside = 2 * costs.parameter_count(QWEN3_8B) + serving_bytes(QWEN3_8B, Limits(256, 8192, 8192), 1, 2) + (1 << 30)
    assert 0 <= 0.9 * (80 << 30) - beside - tokens() * 147456 < 16 * 147456  # less than a page is left
    assert tokens(gpu_memory_utilization=0.5) == tokens() - int(0.4 * (80 << 30)) // (16 * 147456) * 16
    assert 2 * tokens() < tokens(tp=2) < tokens(tp=4) and tokens(tp=2, max_running=3) == 3 * QWEN3_8B.max_positions
    free[1] -= 30 << 30  # somebody else's
    assert tokens() > tokens(tp=2) // 2 and tokens() == tokens(tp=1)
    del free[1:]
    assert 0 < tokens(tp=2) < tokens()  # two processes share a card
    with pytest.raises(ArgumentError, match=r"15.3 GiB of weights, .* do not fit in the 15.0 GiB of a card"):
        tokens(gpu_memory_utilization=0.2)


def test_ranks_answer_as_one_and_end_with_it(plain: Server) -> None:
    """Two processes: the same bits, aborts in step, and an exit code when one dies."""
    with running("tp=2", "prefill_chunk=3") as server:
        expected = plain.client().post("/generate", json=SHORT).json()
        for _ in range(2):
            assert bits(server.client().post("/generate", json=SHORT).json()) == bits(expected)
            with server.client().stream("POST", "/generate", json={**LONG, "stream": True}) as answer:
                next(answer.iter_lines())
            wait_for(server.idle, "pages are still held")
        (child,) = ranks_of(server)
        os.kill(child, signal.SIGKILL)
        answer = server.client().post("/generate", json=SHORT)
        assert answer.status_code in (500, 503) and "rank" in answer.json()["error"]["message"]
        assert server.code() == 1
        assert "samebit: error: the engine failed: " in "".join(server.lines)


def ranks_of(server: Server) -> list[int]:
    """Processes of other ranks: children of the server's fork server."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            name = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        parents[int(folder.name)] = int(stat[1]) if b"resource_tracker" not in name else -1
    mine = [pid for pid, parent in parents.items() if parent == server.process.pid]
    return [pid for pid, parent in parents.items() if parent in mine]


def test_a_model_directory_is_served_as_what_it_holds(plain: Server, tmp_path: Path) -> None:
    source = Source.open(None)
    save(source.config, source.weights(), tmp_path)
    assert source.words
    (tmp_path / "tokenizer.json").write_bytes(source.words.files["tokenizer.json"])
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with running(f"model={tmp_path}") as server:
        assert "weights: 19 of 19 tensors" in "".join(server.lines)
        (model,) = server.client().get("/v1/models").json()["data"]
        assert model["id"] == tmp_path.name
        answer, expected = (s.client().post("/generate", json=SHORT).json() for s in (server, plain))
        assert bits(answer) == bits(expected)
        chat = server.client().post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]})
        assert chat.status_code == 400 and "no chat template" in chat.json()["error"]["message"]
        (tmp_path / "tokenizer.json").unlink()
    with running(f"model={tmp_path}") as server:
        ids = {**{k: v for k, v in SHORT.items() if k != "text"}, "input_ids": list(SHORT["text"].encode())}
        assert [b[0] for b in bits(server.client().post("/generate", json=ids).json())] == [
            b[0] for b in bits(expected)
        ]
        for params in (SHORT, {**ids, "sampling_params": {"stop": "a"}}):
            refused = server.client().post("/generate", json=params)
            assert refused.status_code == 400 and "tokenizer" in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_told_before_the_weights_are_read(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source.open(None)
    save(source.config, source.weights(), tmp_path)
    assert source.words
    (tmp_path / "tokenizer.json").write_bytes(source.words.files["tokenizer.json"])
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        main([f"model={tmp_path}"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(tmp_path) in error
    assert error.startswith("samebit: error: ") and error.count("\n") == 1


def test_what_is_being_read_is_limited_too() -> None:
    loop: Any = SimpleNamespace(ranks=SimpleNamespace(engine=None))
    service = Service(Source.open(None), loop, Metrics(), ServiceLimits(queue=2))
    go = threading.Event()

    async def readers() -> list[Any]:
        reading = [asyncio.create_task(service.read(go.wait, PATIENCE)) for _ in range(3)]
        await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        go.set()
        return await asyncio.gather(*reading, return_exceptions=True)

    first, second, third = asyncio.run(readers())
    assert first is True and second is True
    assert isinstance(third, BadRequest) and third.status == 429
    for aside in (service.read, service.write):
        assert asyncio.run(aside(threading.get_ident)) != threading.get_ident()


def test_bodies_that_arrive_slowly_take_only_so_much_memory() -> None:
    loop: Any = SimpleNamespace(ranks=SimpleNamespace(engine=None))
    service = Service(Source.open(None), loop, Metrics(), ServiceLimits(body_bytes=10))

    async def crowd(size: int) -> list[Any]:
        go = asyncio.Event()

        async def stream() -> AsyncIterator[bytes]:
            yield b"x" * 10
            await go.wait()

        client: Any = SimpleNamespace(headers={}, stream=stream)
        reading = [asyncio.create_task(service.take(client, len)) for _ in range(size)]
        await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*reading, return_exceptions=True)

    for _ in range(2):  # what was refused leaves nothing behind
        *read, refused = asyncio.run(crowd(17))
        assert read == [10] * 16 and isinstance(refused, BadRequest) and refused.status == 429


def test_an_api_key(plain: Server) -> None:
    with running("request_seconds=0.5", SAMEBIT_API_KEY="secret") as server:
        assert server.client().get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
                answer = server.client(headers=headers).post(path, json=SHORT)
                assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
            assert server.client(headers=headers).get("/v1/models").status_code == 401
        mine = server.client(headers={"Authorization": "Bearer secret"})
        short = {"text": "a", "sampling_params": {"max_new_tokens": 1}}
        assert mine.post("/generate", json=short).status_code == 200
        late = mine.post("/generate", json=LONG)  # takes more than half a second
        assert late.status_code == 504 and "took more than 0.5 s" in late.json()["error"]["message"]
        metrics = mine.get("/metrics").text
        assert re.search(r"^samebit_aborted_total 1.0$", metrics, re.M)
        server.signal()
        assert server.code() == 0


def asking(server: Server, body: dict) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
    answers: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            answers.append(server.client().post("/generate", json=body))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: server.metric("running") > 0, "the request did not start")
    return thread, answers


def test_sigterm_drains(plain: Server) -> None:
    thread, answers = asking(plain, LONG)
    plain.signal()
    wait_for(lambda: "draining" in "".join(plain.lines), "the signal was not heard")
    refused = plain.client().post("/generate", json=SHORT)
    assert refused.status_code == 503 and "shutting down" in refused.json()["error"]["message"]
    assert plain.client().get("/health").status_code == 503
    thread.join(PATIENCE)
    (answer,) = answers
    assert isinstance(answer, httpx.Response) and answer.status_code == 200
    assert [len(a["output_ids"]) for a in answer.json()] == [1000] * 4
    assert plain.code() == 0


def test_what_is_not_done_in_time_is_aborted() -> None:
    with running("grace_seconds=0.1") as server:
        thread, answers = asking(server, {**LONG, "sampling_params": {**LONG["sampling_params"], "n": 60}})
        server.signal()
        assert server.code() == 0
        thread.join(PATIENCE)
        (answer,) = answers
        assert isinstance(answer, httpx.Response) and answer.status_code == 503


def test_a_second_sigterm_ends_at_once() -> None:
    with running("tp=2", "grace_seconds=1000") as server:
        children = ranks_of(server)
        assert len(children) == 1
        thread, answers = asking(server, {**LONG, "sampling_params": {**LONG["sampling_params"], "n": 60}})
        server.signal()
        wait_for(lambda: "draining" in "".join(server.lines), "the signal was not heard")
        server.signal()
        assert server.code() == 143
        thread.join(PATIENCE)
        assert isinstance(answers[0], Exception)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "a rank outlived the server")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    """Alone, from the cache and in company, with filters: one answer; SIGTERM ends it."""
    asked = {"text": "some text", "sampling_params": {"max_new_tokens": 20, "top_p": 0.9}, "return_logprob": True}
    with running("device=cuda", f"family={chosen_family()}") as server:
        answers: list[str] = []

        def ask(prompt: str = "some text") -> None:
            answer = server.client().post("/generate", json={**asked, "text": prompt}).json()
            said = answer["output_ids"], answer["meta_info"]["output_token_logprobs"]
            answers.extend([json.dumps(said)] if prompt == "some text" else [])

        ask()
        ask()
        threads = [threading.Thread(target=ask, args=(t,)) for t in ("some text", "some", "another", "some text") * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 8 and len(set(answers)) == 1
        assert server.client().get("/health").status_code == 200
        server.signal()
        assert server.code() == 0
