"""One server for the tests of a module, and an engine of this process beside it."""

from collections.abc import Iterator

import pytest

from rollout.engine import Engine, EngineConfig
from rollout.scheduler import Limits
from tests.rollout.server.client import SOURCE
from tests.rollout.server_process import Server, running, wait_for


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
