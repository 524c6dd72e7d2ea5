"""The ranks of a run while others wait for them: which stand still, which are not heard of, and which node is lost."""

import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from kernels.collectives.heartbeat import Beat, Heard
from rl.errors import LostError

GOES_ON = "the same command goes on from the last checkpoint, with fewer nodes too"
_SILENT = 5.0  # seconds without a sign of life, after which its node is looked at
_GONE = 25.0  # seconds for which a node must not answer
_LOOK = 3.0  # seconds between two looks at a node, and for it to answer


@dataclass
class Nodes:
    """Holds how the other nodes of a run answer: where each one's raylet listens."""

    raylets: Mapping[str, tuple[str, int]]  # of each host
    kill: Callable[["Rank"], None] = lambda rank: None  # ends a rank's process on its node
    gone: set[str] = field(default_factory=set)
    """Hosts that were found to be lost."""
    _since: dict[str, float] = field(default_factory=dict)  # when a node was first found not to answer
    _looked: dict[str, float] = field(default_factory=dict)

    def answers(self, host: str) -> bool:
        """Says whether the node's raylet can be reached now. A refusal is an answer of the node, and none of its raylet."""
        try:
            socket.create_connection(self.raylets[host], timeout=_LOOK).close()
        except OSError:
            return False
        return True

    def lost(self, host: str, patience: float) -> bool:
        """Looks at the node, at times; says whether it has not answered for so long that it is lost."""
        now = time.monotonic()
        if now - self._looked.get(host, -_LOOK) >= _LOOK:
            self._looked[host] = now
            if self.answers(host):
                self._since.pop(host, None)
            else:
                self._since.setdefault(host, now)
        if host not in self._since or time.monotonic() - self._since[host] < min(patience, _GONE):
            return False
        self.gone.add(host)
        return True


@dataclass
class Pulse:
    """Holds since when the ranks of a run are silent: only the time counts in which somebody listened."""

    heard: Heard
    nodes: Nodes
    last: dict[str, Beat] = field(default_factory=dict)
    silent: dict[str, float] = field(default_factory=dict)
    _listened: float | None = None

    def listen(self) -> None:
        """Hears the last beats."""
        now = time.monotonic()
        passed = 0.0 if self._listened is None else min(now - self._listened, 2.0)
        self._listened = now
        for name, beat in self.heard.beats().items():
            still = self.last.get(name) == beat
            self.silent[name] = self.silent.get(name, 0.0) + passed if still else 0.0
            self.last[name] = beat

    def of(self, name: str) -> str:
        """Says where a rank last was."""
        return str(self.last[name]) if name in self.last else "had not begun"

    def others(self, name: str, most: int = 4) -> str:
        """Says who was waiting in a collective meanwhile, and where; "" where nobody was."""
        waiting = [f"{other} {beat}" for other, beat in self.last.items() if other != name and beat.collective]
        more = f" and {len(waiting) - most} more" if len(waiting) > most else ""
        return "; ".join(waiting[:most]) + more

    def absent(self) -> str:
        """Says which ranks had not come to a collective in which others waited; "" where there are none."""
        fleets: dict[str, list[str]] = {}
        for name in self.last:
            fleets.setdefault(name.partition(" rank ")[0], []).append(name)
        found = []
        for names in fleets.values():
            inside = [n for n in names if self.last[n].collective]
            most = max((self.last[n].count for n in inside), default=0)
            late = [n for n in names if n not in inside or self.last[n].count < most]
            if inside and late:
                first = max(inside, key=lambda n: self.last[n].count)
                found.append(
                    f"{first} {self.last[first]}, where {', '.join(f'{n} ({self.of(n)})' for n in late)} did not come"
                )
        return "; ".join(found)


@dataclass
class Rank:
    """Names a process of a fleet, by the name that a user reads."""

    name: str
    actor: Any
    process: psutil.Process | None = None  # known once it has started, on this machine
    host: str | None = None  # of a rank on another node: its address
    pulse: "Pulse | None" = None  # of the run
    pid: int = 0

    def begun(self, pid: int) -> None:
        """Remembers the process by its pid, if it lives on this machine."""
        self.pid = pid
        if self.host is None:
            self.process = psutil.Process(pid) if psutil.pid_exists(pid) else None

    @property
    def stopped(self) -> bool:
        """Says whether a signal or a debugger holds it."""
        try:
            return self.process is not None and self.process.status() in (
                psutil.STATUS_STOPPED,
                psutil.STATUS_TRACING_STOP,
            )
        except psutil.Error:  # it has ended, which Ray tells
            return False

    @property
    def lost(self) -> bool:
        """Says whether its node was found to be lost: it answers nothing any more."""
        return self.pulse is not None and self.host in self.pulse.nodes.gone

    def whereabouts(self) -> str:
        """Says where it last was, and who waited meanwhile; "" where nothing is known."""
        if self.pulse is None or self.name not in self.pulse.last:
            return ""
        others = self.pulse.others(self.name)
        return f"; it {self.pulse.last[self.name]}" + (f", while {others}" if others else "")


class Watch:
    """Looks at ranks that have not answered."""

    def __init__(self, patience: float | None) -> None:
        """`patience`: seconds that a rank may stand still."""
        self.patience = float("inf") if patience is None else patience
        self._since: dict[str, float] = {}

    def look(self, ranks: Iterable[Rank]) -> None:
        """Raises LostError, which names the rank that has been stopped or silent for too long, and ends it: nothing else would;
        or the node that is lost."""
        waited = list(ranks)
        for pulse in {id(rank.pulse): rank.pulse for rank in waited if rank.pulse}.values():
            pulse.listen()
        self._look_at_stopped(waited)
        for rank in waited:
            self._look_at(rank)

    def _look_at_stopped(self, ranks: list[Rank]) -> None:
        now = time.monotonic()
        stopped = {rank.name: rank for rank in ranks if rank.stopped}
        self._since = {name: self._since.get(name, now) for name in stopped}
        for name, since in self._since.items():
            if now - since >= self.patience:
                process = stopped[name].process
                assert process is not None
                process.kill()
                raise LostError(
                    f"{name} (pid {process.pid}) was stopped, by a signal or a debugger, and did not go on within "
                    f"cluster.patience={self.patience:.0f} s{stopped[name].whereabouts()}"
                )

    def _look_at(self, rank: Rank) -> None:
        if rank.pulse is None or rank.stopped:
            return
        pulse, begun = rank.pulse, rank.name in rank.pulse.last
        silent = pulse.silent.get(rank.name, 0.0)
        if rank.host in pulse.nodes.raylets and (not begun or silent >= _SILENT):
            assert rank.host is not None
            if pulse.nodes.lost(rank.host, self.patience):
                raise LostError(f"{node_lost(rank)}, and it does not answer any more{rank.whereabouts()}; {GOES_ON}")
        if begun and silent >= self.patience:
            pulse.nodes.kill(rank)
            raise LostError(
                f"{rank.name} gave no sign of life for cluster.patience={self.patience:.0f} s{rank.whereabouts()}; {GOES_ON}"
            )


def lost_node(ranks: Iterable[Rank]) -> Rank | None:
    """Finds the first of the ranks whose node does not answer."""
    hosts: dict[str, bool] = {}
    for rank in ranks:
        if rank.pulse is not None and rank.host in rank.pulse.nodes.raylets:
            assert rank.host is not None
            if rank.host not in hosts:
                hosts[rank.host] = rank.pulse.nodes.answers(rank.host)
            if not hosts[rank.host]:
                rank.pulse.nodes.gone.add(rank.host)
                return rank
    return None


def node_lost(rank: Rank) -> str:
    """Begins the line of a node that is lost, and with it a rank."""
    return f"node {rank.host} was lost, and with it {rank.name}"
