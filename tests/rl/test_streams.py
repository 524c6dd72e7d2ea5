"""Requests that come and go over a fleet of engines: every rank of an engine hears the same, and nobody waits for another."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.exceptions import RayTaskError

from rl.cluster.calls import first
from rl.cluster.streams import Streams
from rl.cluster.watch import Rank
from rl.errors import RunError
from rollout.engine import Engine
from rollout.lockstep import Lockstep
from rollout.replies import STEPS
from rollout.sampling import Completion, Request, SamplingParams
from tests.model.shapes import TINY
from tests.rollout.scenarios import engine
from tests.rollout.test_loop import CONFIG
from tests.rollout.test_loop import TINY as SERVED

ANSWER = (3, 1, 4)


class Answers:
    """Answers every completion with fixed tokens, `turns` times; some late, by what `late` draws."""

    def __init__(self, requests: Sequence[Request], turns: int, late: random.Random) -> None:
        self.turns, self.late = turns, late
        self.heard: dict[int, list[Completion]] = {r.id: [] for r in requests}
        self._last = {r.id: r for r in requests}
        self._waiting: list[Request] = []

    def take(self, completions: Sequence[Completion]) -> None:
        for c in completions:
            self.heard[c.request_id].append(c)
            last = self._last[c.request_id]
            following = replace(last, prompt_ids=(*last.prompt_ids, *c.token_ids, *ANSWER))
            self._last[c.request_id] = following
            if len(self.heard[c.request_id]) < self.turns:
                self._waiting.append(following)

    def requests(self, idle: bool) -> list[Request]:
        chosen = [r for r in self._waiting if self.late.random() < 0.5]
        if idle and not chosen:
            chosen = self._waiting[:1]
        self._waiting = [r for r in self._waiting if r not in chosen]
        return chosen


def asked(count: int) -> list[Request]:
    return [Request(i, (1 + i // 2, 5, 9), SamplingParams(3 + i % 4, seed=i)) for i in range(count)]


@cache
def alone(request: Request, turns: int) -> list[Completion]:
    out: list[Completion] = []
    for _ in range(turns):
        (done,) = engine(TINY, prefix_cache=False).generate([request])
        out.append(done)
        request = replace(request, prompt_ids=(*request.prompt_ids, *done.token_ids, *ANSWER))
    return out


class Actor:
    """A rank whose calls are done at once, on an engine of its own; remembers what it was told."""

    def __init__(self, **limits: Any) -> None:
        self.engine: Engine = engine(TINY, **limits)
        self.told: list[list[int]] = []
        self.advance = self

    def remote(self, requests: Sequence[Request], steps: int) -> tuple[Completion, ...]:
        assert steps == STEPS
        self.told.append([r.id for r in requests])
        return Done(self.engine.advance(requests, steps))


class Done(tuple[Completion, ...]):
    """A result; each is another one, as references of Ray are."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


@settings(deadline=None, max_examples=25)
@given(engines=st.integers(1, 3), ranks=st.integers(1, 2), count=st.integers(1, 7), seed=st.integers(0, 9))
def test_every_rank_of_an_engine_hears_the_same(engines: int, ranks: int, count: int, seed: int) -> None:
    """And every conversation is what it is alone, whatever comes late and whichever engine is first."""
    late = random.Random(seed)
    fleet = [[Rank(f"{e} {r}", Actor(pages=60, page_size=4)) for r in range(ranks)] for e in range(engines)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rl.cluster.streams.first", lambda groups, patience: late.randrange(len(groups)))
        patch.setattr("rl.cluster.streams.gather", lambda calls, patience: list(calls))
        replies = Answers(asked(count), 3, late)
        Streams(fleet, 1.0).converse(asked(count), replies)
    for request in asked(count):
        assert replies.heard[request.id] == alone(request, 3)
    for group in fleet:
        told = [rank.actor.told for rank in group]
        assert all(t == told[0] for t in told) and group[0].actor.engine.idle
    homes = [{i for told in group[0].actor.told for i in told} for group in fleet]
    assert sum(map(len, homes)) == count, "a conversation stays where its keys are"


@pytest.mark.parametrize("size", [1, 2])
def test_the_engine_of_an_evaluation_takes_what_follows(size: int) -> None:
    requests = [Request(i, (7 + i, 8), SamplingParams(5, seed=i)) for i in range(4)]
    found = []
    for seed in (0, 1):
        replies = Answers(requests, 3, random.Random(seed))
        with Lockstep(SERVED, CONFIG, size, 1) as ranks:
            assert ranks.generate(requests, replies) == [] and ranks.engine.idle
            assert ranks.generate(requests[:1])[0] == replies.heard[0][0]
        found.append(replies.heard)
    assert found[0] == found[1] and all(len(turns) == 3 for turns in found[0].values())


def test_an_engine_does_as_many_steps_as_it_is_told() -> None:
    by, request = engine(TINY, chunk=2), Request(0, (1, 2, 3, 4), SamplingParams(4))
    assert [by.advance([request], 1), by.advance((), 1), by.advance((), 2)] == [[], [], []]
    assert not by.idle and len(by.advance((), 50)) == 1 and by.idle and by.advance((), 5) == []


def test_the_first_engine_that_is_done_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks of it; a failure of any rank is looked at without waiting for the others."""
    order = iter([["a0"], ["b1"], ["b0"]])
    monkeypatch.setattr(ray, "wait", lambda waiting, timeout: (next(order), []))
    monkeypatch.setattr("rl.cluster.calls.check_ray", lambda: None)
    failed: set[str] = set()

    def get(reference: str) -> str:
        if reference in failed:
            raise RayTaskError("advance", "", RuntimeError("it broke"))
        return reference

    monkeypatch.setattr(ray, "get", get)
    groups = [{f"{e}{r}": Rank(f"{e}{r}", None) for r in (0, 1)} for e in "ab"]
    assert first(groups) == 1
    order, failed = iter([["b0"], ["a1"]]), {"a1"}
    assert first(groups) == 0


def test_ray_is_looked_at_while_no_engine_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda waiting, timeout: ([], waiting))

    def lost() -> None:
        raise RunError("Ray is lost")

    monkeypatch.setattr("rl.cluster.calls.check_ray", lost)
    with pytest.raises(RunError, match="Ray is lost"):
        first([{"a": Rank("a", None)}])
