"""Seconds and spans of a step's phases."""

from typing import Any

import pytest

from rl import clock as module
from rl.clock import Clock
from rl.lag import Lagging
from tests.rl.test_lag import Slow


class Time:
    """A clock that is told how late it is."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module, "_SINCE", 1000.0)
    return made


def spend(clock: Clock, now: Time, phase: str, of: Any, seconds: float) -> None:
    with clock(phase, of=of):
        now.now += seconds


def test_one_after_the_other(now: Time) -> None:
    clock = Clock()
    for phase, of, seconds in (
        ("sample", "sampler", 4),
        ("train", "trainer", 2),
        ("sample", "sampler", 1),
        ("publish", "both", 3),
    ):
        spend(clock, now, phase, of, seconds)
    told = clock.told()
    assert (told["time/sample"], told["time/train"], told["time/publish"], told["time/step"]) == (5, 2, 3, 10)
    assert (told["time/sampler_busy"], told["time/trainer_busy"], told["time/step_over_longer_half"]) == (5, 2, 2)
    assert told["time/spans"] == [
        ["sampler", "sample", 1100, 1104],
        ["trainer", "train", 1104, 1106],
        ["sampler", "sample", 1106, 1107],
        ["both", "publish", 1107, 1110],
    ]


def test_at_once(now: Time) -> None:
    """A second clock keeps its spans with the first one's, and its seconds for itself; who waits is not busy."""
    clock = Clock()
    other = Clock(clock.spans)
    with other("sample", of="sampler"):
        spend(clock, now, "train", "trainer", 3)
        with clock("wait", of="none"):
            now.now += 1
    told = clock.told()
    assert "time/sample" not in told and other.seconds == {"time/sample": 4}
    assert (told["time/sampler_busy"], told["time/trainer_busy"], told["time/step_over_longer_half"]) == (4, 3, 1)


def test_a_step_in_which_nobody_works_has_no_ratio(now: Time) -> None:
    assert "time/step_over_longer_half" not in Clock().told()


@pytest.mark.parametrize(("lag", "at_once"), [(0, False), (1, False), (1, True)])
def test_spans_of_a_step_are_what_was_done_in_it(lag: int, at_once: bool) -> None:
    """For whichever step: at once the engines draw for the next one."""
    fake = Slow()
    step = Lagging(fake.steps(), lag, 1, None, at_once, None) if lag else fake.steps()
    told = [step(number, show=False)[0] for number in (1, 2, 3)]
    ends = 0.0
    for metrics in told:
        spans = metrics["time/spans"]
        assert {"sample", "score", "train", "publish"} <= {phase for _, phase, _, _ in spans}
        assert all(ends <= start <= end for _, _, start, end in spans), "spans of an earlier step"
        ends = max(end for *_, end in spans)
        by_side = {side: [(s, e) for of, _, s, e in spans if of == side] for side in ("sampler", "trainer")}
        for mine in by_side.values():
            assert all(a[1] <= b[0] + 1e-3 for a, b in zip(sorted(mine), sorted(mine)[1:], strict=False)), (
                "one side, twice at once"
            )
        assert metrics["time/step"] >= max(metrics["time/sampler_busy"], metrics["time/trainer_busy"]) - 1e-3
