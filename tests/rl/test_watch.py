"""Which rank or node the driver names, by what it hears of them, without starting any."""

import socket
from typing import Any

import pytest

from kernels.collectives.heartbeat import Beat
from rl.cluster.calls import gather, settle
from rl.cluster.watch import Nodes, Pulse, Rank, Watch, lost_node
from rl.errors import LostError, RunError, during

NAMES = ("trainer rank 0 (10.0.0.1)", "trainer rank 1 (10.0.0.2)", "trainer rank 2 (10.0.0.2)")


class Heard:
    """Beats of all but the silent, as they are at the next look."""

    def __init__(self) -> None:
        self.number, self.silent, self.found = 0, set[str](), dict[str, Beat]()

    def beats(self) -> dict[str, Beat]:
        self.number += 1
        for name in (n for n in NAMES if n not in self.silent):
            self.found[name] = Beat(self.number, "step", "trainer/a.py:1 f", "all_gather", 7)
        for name in (n for n in NAMES if n in self.silent and n in self.found):
            self.found[name] = Beat(self.found[name].number, "step", "trainer/a.py:2 g", "", 6)
        return dict(self.found)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("rl.cluster.watch.time.monotonic", made)
    return made


def ranks_of(heard: Heard, nodes: Nodes) -> list[Rank]:
    pulse: Any = Pulse(heard, nodes)  # type: ignore[arg-type]
    return [Rank(name, None, host=None if i == 0 else "10.0.0.2", pulse=pulse) for i, name in enumerate(NAMES)]


def look_for(watch: Watch, ranks: list[Rank], clock: Clock, seconds: float) -> None:
    for _ in range(int(seconds)):
        clock.now += 1
        watch.look(ranks)


def test_a_silent_rank_of_a_node_that_answers_is_named_with_who_waited(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Nodes, "answers", lambda self, host: True)
    heard, killed = Heard(), list[Rank]()
    ranks = ranks_of(heard, Nodes({"10.0.0.2": ("10.0.0.2", 1)}, killed.append))
    watch = Watch(20)
    look_for(watch, ranks, clock, 10)
    heard.silent = {NAMES[1]}
    look_for(watch, ranks, clock, 19)
    with pytest.raises(LostError) as told:
        look_for(watch, ranks, clock, 3)
    where, waits = "was in step at trainer/a.py", "waiting in all_gather (number 7)"
    assert str(told.value) == (
        f"{NAMES[1]} gave no sign of life for cluster.patience=20 s; it {where}:2 g, while {NAMES[0]} {where}:1 f, {waits}; "
        f"{NAMES[2]} {where}:1 f, {waits}; the same command goes on from the last checkpoint, with fewer nodes too"
    )
    assert killed == [ranks[1]]


def test_time_in_which_nobody_listens_does_not_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver scores, or the whole machine stands still."""
    monkeypatch.setattr(Nodes, "answers", lambda self, host: True)
    heard = Heard()
    ranks, watch = ranks_of(heard, Nodes({})), Watch(20)
    look_for(watch, ranks, clock, 3)
    heard.silent = set(NAMES)
    clock.now += 10_000
    look_for(watch, ranks, clock, 15)
    heard.silent = set()
    look_for(watch, ranks, clock, 100)


@pytest.mark.parametrize("begun", [True, False])
def test_a_node_that_does_not_answer_is_lost_before_its_ranks_are(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Also one whose ranks have not begun; one that answers now and then is not."""
    heard, answers = Heard(), [True]
    monkeypatch.setattr(Nodes, "answers", lambda self, host: answers[0])
    ranks, watch = ranks_of(heard, Nodes({"10.0.0.2": ("10.0.0.2", 1)})), Watch(60)
    heard.silent = set() if begun else set(NAMES[1:])
    look_for(watch, ranks, clock, 5)
    heard.silent = set(NAMES[1:])
    for _ in range(5):
        answers[0] = not answers[0]
        look_for(watch, ranks, clock, 9 if begun else 20)
    heard.silent = set()
    look_for(watch, ranks, clock, 1)
    heard.silent, answers[0] = set(NAMES[1:]), False
    with pytest.raises(
        LostError, match=r"^node 10.0.0.2 was lost, and with it trainer rank 1 \(10.0.0.2\), and it does not"
    ):
        look_for(watch, ranks, clock, 45)
    assert ranks[1].lost and ranks[2].lost and not ranks[0].lost
    monkeypatch.setattr(
        "rl.cluster.calls.ray.wait", lambda waiting, **_: list(waiting) == ["one"] or pytest.fail("waits")
    )
    settle({"one": ranks[0], "other": ranks[1]})


def test_a_collective_that_times_out_names_who_did_not_come() -> None:
    heard = Heard()
    (rank, *_) = ranks_of(heard, Nodes({}))
    assert rank.pulse is not None
    rank.pulse.listen()
    assert rank.pulse.absent() == ""
    heard.silent = {NAMES[2]}
    rank.pulse.listen()
    assert rank.pulse.absent() == (
        f"{NAMES[0]} was in step at trainer/a.py:1 f, waiting in all_gather (number 7), where {NAMES[2]} (was in step at "
        f"trainer/a.py:2 g) did not come"
    )
    with pytest.raises(LostError, match=r"^step 3: here$"), during("step 3"):
        raise LostError("here")
    with pytest.raises(RunError, match=r"^here$"), during("step 3"):
        raise RunError("here")


def test_a_node_is_asked_where_its_ray_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nodes = Nodes({"10.0.0.2": listener.getsockname()})
        ranks = ranks_of(Heard(), nodes)
        assert lost_node(ranks) is None and not ranks[1].lost
    assert lost_node(ranks) is ranks[1] and ranks[2].lost


def test_a_call_without_signs_of_life_waits_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl.cluster.calls.ray.wait", lambda waiting, timeout: ([], list(waiting)))
    with pytest.raises(RunError, match="trainer rank 0 did not answer within 0 s"):
        gather({"one": Rank("trainer rank 0", None)}, timeout=0)  # type: ignore[arg-type]
