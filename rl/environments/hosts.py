"""Keeps the objects of conversations in processes, asks them, and hears from them.

What comes of a conversation does not depend on how many processes there are. One that ends with its process, or takes too long,
is told of; the others that lived there are made again elsewhere, from what they were asked so far.
"""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from rl.environments.worker import TOGETHER, About, Action, Result, serve
from rl.errors import UserError
from rl.rewards.process import JudgeError, Process
from rl.rewards.worker import Wanted

_PATIENCE = 60.0  # seconds before it is said that something is still under way
_SEATS = 32  # conversations of a process before another one is worth its start


class Thread:
    """Stands for a process where the factory is an object of this one: nothing ends a call that does not end."""

    has_ended = False

    def __init__(self, factory: Any, args: Mapping[str, Any]) -> None:
        self.pipe, theirs = Pipe()
        threading.Thread(target=serve, args=(theirs, Wanted("", args), lambda: factory), daemon=True).start()

    def tell(self, message: Any) -> None:
        """Sends a message."""
        self.pipe.send(message)

    def receive(self) -> Any:
        """Returns its next message."""
        return self.pipe.recv()

    def how_it_ended(self) -> str:
        """Says how it ended, which nobody asks: a thread ends with its pipe."""
        return "ended"

    def kill(self) -> None:
        """Closes the pipe, at which the thread ends."""
        self.pipe.close()


Worker = Process | Thread


@dataclass(eq=False)
class Seat:
    """Stands for the object of one conversation, wherever it lives."""

    number: int
    asked: tuple[Action, ...] = ()  # under way; () where it waits for nothing
    done: list[tuple[Action, Result]] = field(default_factory=list)  # to be asked again where it is lost
    again: int = 0  # actions that were made again before those that are under way
    alone: bool = False  # it was lost with others: was it the one?
    host: "_Host | None" = None
    since: float = 0.0  # when its process was asked


@dataclass(eq=False)
class _Host:
    """Holds a process with its conversations."""

    worker: Worker
    ready: bool = False
    alone: bool = False  # one conversation has it for itself
    seats: set[Seat] = field(default_factory=set)
    busy: set[Seat] = field(default_factory=set)


class Hosts:
    """Asks objects of one factory, in up to `workers` processes, and in as many again those that are asked alone."""

    def __init__(self, factory: str, args: Mapping[str, Any], workers: int, timeout: float, found: Any = None) -> None:
        """Imports the factory: UserError where that fails. `timeout`: seconds of one call. `found`: the factory itself, where
        it is an object of this process; its calls then have no time-out."""
        self._wanted, self._found = Wanted(factory, args), found
        self._workers = 1 if found else workers
        self._timeout = float("inf") if found else timeout
        self._hosts: list[_Host] = []
        self._waiting: deque[Seat] = deque()
        self._answers: list[tuple[Seat, list[Result]]] = []
        self._numbers = 0
        first = self._start()
        self._await(first)
        self._tell(first, (0, ()))
        self.about: About = self._await(first)

    def _await(self, host: _Host) -> Any:
        """Waits for the first words of a process, and says so where that takes long."""
        begun = told = time.monotonic()
        while not host.worker.pipe.poll(1.0) and not host.worker.has_ended:
            if (now := time.monotonic()) - told > _PATIENCE:
                told = now
                print(f"still waiting for the import of {self._wanted.function} ({now - begun:.0f} s)", flush=True)
        if not host.ready:
            return self._hear(host)
        try:
            (result,) = host.worker.receive()[1]
        except JudgeError as error:
            result = Result(error=str(error))
        if result.error:
            self.close()
            raise UserError(f"environment.factory={self._wanted.function!r}: {result.error}")
        return result.value

    def seat(self) -> Seat:
        """Makes a place for another conversation."""
        self._numbers += 1
        return Seat(self._numbers)

    def ask(self, seat: Seat, actions: Sequence[Action]) -> None:
        """Asks for actions, one after the other up to the first that fails; `answers` brings what they came to."""
        seat.asked = tuple(actions)
        self._waiting.append(seat)

    def leave(self, seat: Seat) -> None:
        """Forgets a conversation, whatever it waits for."""
        if seat.asked or seat in [s for s, _ in self._answers]:
            self._waiting = deque(s for s in self._waiting if s is not seat)
            self._answers = [(s, results) for s, results in self._answers if s is not seat]
        if host := seat.host:
            host.seats.discard(seat)
            host.busy.discard(seat)
            self._tell(host, (seat.number, None))
        seat.host = None

    def answers(self, patience: float) -> list[tuple[Seat, list[Result]]]:
        """Returns what has come of actions, waiting up to `patience` seconds for the first."""
        end = time.monotonic() + patience
        while True:
            self._hand_out()
            pause = 0.0 if self._answers else max(0.0, min(1.0, end - time.monotonic()))
            pipes = {h.worker.pipe: h for h in self._hosts}
            for pipe in wait(list(pipes), pause):
                if pipes[pipe] in self._hosts:  # type: ignore[index]
                    self._hear(pipes[pipe])  # type: ignore[index]
            for host in [h for h in self._hosts if h.worker.has_ended and not h.worker.pipe.poll()]:
                self._lost(host, None, host.worker.how_it_ended())
            self._look_at_the_clock()
            if self._answers or time.monotonic() >= end:
                self._hand_out()
                out, self._answers = self._answers, []
                return out

    def close(self) -> None:
        """Ends all processes."""
        for host in list(self._hosts):
            self._remove(host)

    def _start(self, alone: bool = False) -> _Host:
        worker: Worker
        if self._found:
            worker = Thread(self._found, self._wanted.args)
        else:
            worker = Process([self._wanted], "rl.environments.worker")
        self._hosts.append(host := _Host(worker, alone=alone))
        return host

    def _hand_out(self) -> None:
        """Asks what waits of the processes that can take it."""
        left: list[Seat] = []
        while self._waiting:
            seat = self._waiting.popleft()
            host = seat.host or self._place(seat)
            if host is None or len(host.busy) >= TOGETHER or not host.ready:
                left.append(seat)
                continue
            seat.again = 0 if seat.host else len(seat.done)
            seat.host, seat.since = host, time.monotonic()
            host.seats.add(seat)
            host.busy.add(seat)
            self._tell(host, (seat.number, [*(action for action, _ in seat.done[: seat.again]), *seat.asked]))
        self._waiting.extend(left)
        shared = [h for h in self._hosts if not h.alone]
        crowded = all(h.ready and len(h.seats) >= _SEATS for h in shared)
        if left and len(shared) < self._workers and (crowded or not shared):
            self._start()

    def _place(self, seat: Seat) -> _Host | None:
        if seat.alone:
            lone = [h for h in self._hosts if h.alone]
            free = next((h for h in lone if not h.seats), None)
            return free or (self._start(alone=True) if len(lone) < self._workers else None)
        shared = [h for h in self._hosts if not h.alone and h.ready]
        if all(len(h.seats) >= _SEATS for h in shared) and len([h for h in self._hosts if not h.alone]) < self._workers:
            return None  # another one is on its way
        return min(shared, key=lambda h: len(h.seats), default=None)

    def _tell(self, host: _Host, message: Any) -> None:
        try:
            host.worker.tell(message)
        except JudgeError as error:  # it ended before it could hear this
            self._lost(host, set(), str(error))

    def _hear(self, host: _Host) -> None:
        try:
            message = host.worker.receive()
        except JudgeError as error:
            self._lost(host, None, str(error))
            return
        if not host.ready:
            if isinstance(message, str):
                self._remove(host)
                raise UserError(f"environment.factory={self._wanted.function!r}: {message}")
            host.ready = True
            return
        number, results = message
        seat = next((s for s in host.busy if s.number == number), None)
        if seat is None:
            return
        host.busy.discard(seat)
        if host.alone:
            self._cleared(host, seat)
        if results[: seat.again] != [result for _, result in seat.done[: seat.again]]:
            how = "answers otherwise when it is asked again: it depends on more than it is told"
            self._answer(seat, [Result(error=how)])
        else:
            self._answer(seat, results[seat.again :])

    def _cleared(self, host: _Host, seat: Seat) -> None:
        """Lets a conversation live among others again: it was not the one that ended a process."""
        seat.alone = host.alone = False
        if len([h for h in self._hosts if not h.alone]) > self._workers:
            self._remove(host)
            seat.host = None

    def _answer(self, seat: Seat, results: list[Result]) -> None:
        seat.done += zip(seat.asked, results, strict=False)
        seat.asked = ()
        self._answers.append((seat, results))

    def _lost(self, host: _Host, late: set[Seat] | None, how: str) -> None:
        """Ends a process. `late`: the conversations it is ended for; None: it ended itself, which is the fault of the one that
        had calls under way; of several, each is asked again alone."""
        if host not in self._hosts:
            return
        self._remove(host)
        if not host.ready:
            raise UserError(f"environment.factory={self._wanted.function!r}: its import {how}")
        guilty = late if late is not None else host.busy if len(host.busy) == 1 else set()
        for seat in sorted(host.seats, key=lambda seat: seat.number):
            seat.host = None
            if seat in guilty:
                self._answer(seat, [Result(error=how)])
            elif seat in host.busy:
                seat.alone = seat.alone or late is None
                self._waiting.append(seat)

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for host in list(self._hosts):
            late = {s for s in host.busy if now - s.since > self._timeout * (s.again + len(s.asked))}
            if late:
                how = f"took more than {self._timeout:g} s (environment.timeout; a clock decides that)"
                self._lost(host, late, how)

    def _remove(self, host: _Host) -> None:
        if host in self._hosts:
            self._hosts.remove(host)
            host.worker.kill()
