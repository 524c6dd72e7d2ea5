"""Objects of conversations in processes: what comes of one does not depend on the others, whatever they do."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from rl.environments.hosts import Hosts, Seat
from rl.environments.worker import END, RESET, TOOL, Action, Result
from rl.errors import UserError
from tests.rl.environments.games import Notes

GAMES = "tests.rl.environments.games"


@pytest.fixture(scope="module")
def bad() -> Iterator[Hosts]:
    hosts = Hosts(f"{GAMES}:Bad", {}, workers=2, timeout=20)
    yield hosts
    hosts.close()


def played(hosts: Hosts, rows: list[dict[str, Any]], rounds: int = 3) -> list[list[Result]]:
    """What each conversation hears: reset, `rounds` notes, the end."""
    script = [
        Action(RESET, arguments={}),
        *(Action(TOOL, "note", {"text": "x" * i}) for i in range(rounds)),
        Action(END),
    ]
    seats = [hosts.seat() for _ in rows]
    heard: dict[Seat, list[Result]] = {seat: [] for seat in seats}
    for seat, row in zip(seats, rows, strict=True):
        hosts.ask(seat, [script[0]._replace(arguments=row)])
    left = set(seats)
    while left:
        for seat, results in hosts.answers(1.0):
            heard[seat] += results
            if results[-1].error or len(heard[seat]) == len(script):
                hosts.leave(seat)
                left.discard(seat)
            else:
                hosts.ask(seat, [script[len(heard[seat])]])
    return [heard[seat] for seat in seats]


def test_it_says_what_it_has(bad: Hosts) -> None:
    assert [t["function"]["name"] for t in bad.about.tools] == ["note", "wait"]
    assert bad.about.name == "Bad" and bad.about.rewards and not bad.about.teaches
    schema = bad.about.tools[1]["function"]
    assert schema["parameters"]["properties"]["seconds"] == {"type": "number", "description": "How long."}


@pytest.mark.parametrize(
    ("does", "at", "part"),
    [
        ("exit", 2, "ended its process (exit code 3)"),
        ("crash", 2, "ended its process (signal 11"),
        ("quit", 2, "raised SystemExit: 1 in note"),
        ("reset", 0, "raised RuntimeError: no board in reset"),
        ("nan", 4, "a reward that is nan"),
    ],
)
def test_one_that_fails_costs_itself(bad: Hosts, does: str, at: int, part: str) -> None:
    """All others, in the same process, hear what they would hear alone."""
    rows = [{"name": f"n{i}", "does": does if i in (3, 11) else ""} for i in range(20)]
    heard = played(bad, rows)
    for i, results in enumerate(heard):
        if i in (3, 11):
            assert len(results) == at + 1 and part in results[-1].error
        else:
            texts = [r.value for r in results[:-1]]
            assert texts == [f"n{i}:", f"n{i}1", f"n{i}2", f"n{i}3"]
            assert results[-1].value == (3.0, {"told": ["", "x", "xx"]}), "a reward, and what is public and plain"


def test_what_a_tool_raises_is_told(bad: Hosts) -> None:
    (results,) = played(bad, [{"name": "a", "does": "raise"}])
    assert results[2] == Result('{"error": "not that"}', raised=True) and not results[-1].error


def test_one_that_takes_too_long_costs_itself() -> None:
    hosts = Hosts(f"{GAMES}:Bad", {}, workers=1, timeout=2)
    heard = played(hosts, [{"name": f"n{i}", "does": "hang" if i == 1 else ""} for i in range(6)])
    assert "took more than 2 s" in heard[1][-1].error
    assert all(not r.error for i, results in enumerate(heard) for r in results if i != 1)
    hosts.close()


def test_one_that_answers_otherwise_when_it_is_made_again_is_an_error(bad: Hosts) -> None:
    """A clock told it something; the process was lost to another one."""
    hosts = Hosts(f"{GAMES}:Bad", {}, workers=1, timeout=20)
    clock, other = hosts.seat(), hosts.seat()
    for seat, does in ((clock, "clock"), (other, "exit")):
        first = [Action(RESET, arguments={"name": "a", "does": does}), Action(TOOL, "note", {"text": "1"})]
        hosts.ask(seat, first)
    waiting = 2
    while waiting:
        waiting -= len(hosts.answers(1.0))
    hosts.ask(clock, [Action(TOOL, "note", {"text": "2"})])
    while not hosts.answers(1.0):
        pass
    hosts.ask(other, [Action(TOOL, "note", {"text": "2"})])
    while not (lost := hosts.answers(1.0)):
        pass
    assert "ended its process" in lost[0][1][-1].error
    hosts.ask(clock, [Action(END)])
    while not (found := hosts.answers(1.0)):
        pass
    assert "answers otherwise" in found[0][1][-1].error
    hosts.close()


def test_calls_of_many_conversations_run_beside_each_other() -> None:
    """Sync ones in threads, async ones in one loop: 12 that each wait half a second."""
    hosts = Hosts(f"{GAMES}:Notes", {}, workers=1, timeout=60)
    begun = time.monotonic()
    assert len(played(hosts, [{"name": "a", "pause": 0.5}] * 12, rounds=1)) == 12
    seats = [hosts.seat() for _ in range(12)]
    for seat in seats:
        hosts.ask(seat, [Action(RESET, arguments={"name": "a"}), Action(TOOL, "wait", {"seconds": 0.5})])
    left = 12
    while left:
        left -= len(hosts.answers(1.0))
    assert time.monotonic() - begun < 12, "one after the other they take 12 s"
    hosts.close()


def test_an_object_of_this_process_is_the_same() -> None:
    here, there = Hosts("", {}, 1, 60, found=Notes), Hosts(f"{GAMES}:Notes", {}, 2, 60)
    rows = [{"name": f"n{i}"} for i in range(40)]
    assert played(here, rows) == played(there, rows)
    here.close()
    there.close()


@pytest.mark.parametrize(
    ("factory", "part"),
    [
        (f"{GAMES}:NoReset", "NoReset has no method reset"),
        (f"{GAMES}:Untyped", "Untyped.note is no tool"),
        (f"{GAMES}:Nothing", "Nothing"),
        ("no.module:Class", "No module named 'no'"),
        ("Notes", "no ':'"),
    ],
)
def test_what_is_no_environment_is_refused(factory: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        Hosts(factory, {}, 1, 60)
    assert part in str(error.value) and "\n" not in str(error.value) and factory in str(error.value)
