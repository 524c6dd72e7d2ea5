"""The engine's thread: what it tells whom, when a request fails, and when the engine does."""

import os
import queue
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe

import pytest
import torch

from kernels.model import Parameter
from rollout.engine import EngineConfig
from rollout.lockstep import Lockstep, News, RankError
from rollout.loop import EngineLoop, Event
from rollout.runner import RunnerError
from rollout.sampling import Completion, Request, SamplingParams, Token
from rollout.scheduler import Limits
from rollout.source import Source

TINY = Source.open(None)
CONFIG = EngineConfig(64, 16, True, Limits(4, 64, 64))
PATIENCE = 60


class NoNumbers(Source):
    def weights(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        return ((p, w * float("nan")) for p, w in super().weights())


class Silent:
    def token(self, request_id: int, sample: int) -> None: ...
    def completion(self, completion: Completion) -> None: ...
    def step(self, seconds: float, loop: EngineLoop) -> None: ...


def started(source: Source = TINY) -> EngineLoop:
    loop = EngineLoop(Lockstep(source, CONFIG, 1, 1), Silent())
    loop.start()
    return loop


def told(events: "queue.Queue[Event]") -> list[Event]:
    """Up to the last one."""
    found = []
    while not found or isinstance(found[-1], Token):
        found.append(events.get(timeout=PATIENCE))
    return found


def ask(loop: EngineLoop, request_id: int = 0, new: int = 5) -> "queue.Queue[Event]":
    events: queue.Queue[Event] = queue.Queue()
    loop.submit(Request(request_id, (1, 2, 3), SamplingParams(new)), events.put)
    return events


def test_tokens_and_then_the_completion() -> None:
    loop = started()
    *tokens, done = told(ask(loop))
    assert isinstance(done, Completion) and [t.id for t in tokens] == list(done.token_ids)
    loop.stop()
    loop.join(PATIENCE)
    assert not loop.is_alive() and loop.failure is None


def test_the_last_of_several_samples_ends_the_request() -> None:
    loop = started()
    events: queue.Queue[Event] = queue.Queue()
    loop.submit(Request(0, (1, 2, 3), SamplingParams(5, n=3)), events.put)
    assert {told(events)[-1].sample for _ in range(3)} == {0, 1, 2}
    assert isinstance(told(ask(loop, 1))[-1], Completion)  # the turn of the last sample is over
    assert 0 not in loop._sinks


def test_what_is_released_and_resumed() -> None:
    with Lockstep(TINY, CONFIG, 1, 1) as ranks:
        memory = ranks.engine.runner.page_memory, ranks.engine.runner.weight_memory
        for order, held in (
            ("release pages", [False, True]),
            ("release all", [False, False]),
            ("resume", [True, True]),
        ):
            ranks.turn(News(memory=[order]))
            assert [m.held for m in memory] == held, order
        assert ranks.engine.version == 0 and len(ranks.generate([Request(0, (1,), SamplingParams(2))])) == 1


def ends(*_: object) -> None:
    """The life of a peer that an interrupt ends while it starts."""
    os._exit(1)


def test_a_peer_that_ends_while_it_starts_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the rendezvous rank 0 would wait for minutes, and hear no second interrupt either."""
    monkeypatch.setattr("rollout.lockstep._follow", ends)
    monkeypatch.setattr("rollout.lockstep._engine", lambda *_: pytest.fail("the rendezvous began"))
    with pytest.raises(RankError, match="rank 1 ended while it started"):
        Lockstep(TINY, CONFIG, 2, 1)


def test_no_number_is_no_rank_that_has_gone() -> None:
    """With peers to hear of it too."""
    here, there = Pipe()
    with Lockstep(
        NoNumbers(**{name: getattr(TINY, name) for name in Source.__dataclass_fields__}), CONFIG, 1, 1
    ) as ranks:
        ranks.pipes = [there]
        with pytest.raises(RunnerError):
            ranks.turn(News([Request(0, (1, 2), SamplingParams(2))]))
        assert News.decode(here.recv_bytes()).requests[0].id == 0


def test_an_abort_before_or_in_the_middle_of_a_request() -> None:
    loop = started()
    for request_id in range(20):
        events = ask(loop, request_id, new=900 if request_id % 2 else 1)
        loop.abort(request_id)
        last = told(events)[-1]
        assert isinstance(last, Completion)
        assert last.finish_reason == "abort" or request_id % 2 == 0
        assert events.empty()
    loop.abort(99)
    assert isinstance(told(ask(loop, 100))[-1], Completion)
    assert loop.ranks.engine.idle and loop.ranks.engine.pool.available == 64


def test_weights_that_give_no_number_fail_the_request_and_not_the_loop() -> None:
    loop = started(NoNumbers(**{name: getattr(TINY, name) for name in Source.__dataclass_fields__}))
    for _ in range(2):  # with the same id: the first has left no trace
        (error,) = told(ask(loop))
        assert isinstance(error, RunnerError) and loop.failure is None
    assert loop.ranks.engine.pool.available == 64


def test_a_rank_that_is_gone_fails_all_requests_and_those_that_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = started()
    heard: queue.Queue[bool] = queue.Queue()
    loop.on_failure = lambda: heard.put(True)

    def broken(news: News) -> list:
        raise RankError("rank 1 has ended")

    monkeypatch.setattr(loop.ranks, "turn", broken)
    assert [str(e) for e in told(ask(loop))] == ["rank 1 has ended"]
    assert heard.get(timeout=PATIENCE) and isinstance(loop.failure, RankError)
    assert [str(e) for e in told(ask(loop, 1))] == ["rank 1 has ended"]


def test_what_other_ranks_hear_is_what_was_said() -> None:
    asked = SamplingParams(5, 0.7, 2**63 - 1, (3, 4), ("a", "\n語"), 3)
    requests = [Request(2**40, (1, 2), asked, 1, 5), Request(1, (0,), replace(asked, stop=()))]
    told = ["release pages", "resume"]
    for news in (News(requests, [7, 8], False, []), News([], [7], True, []), News([], [], False, told)):
        assert News.decode(news.encode()) == news
    assert News().encode() == b"" and News.decode(b"") == News()
