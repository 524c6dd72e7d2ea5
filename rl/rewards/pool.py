"""Judges in processes: hands calls out in their order, and collects what comes of them.

What a call finds does not depend on how many processes there are or which one makes it. A call that ends its process, or takes
too long, costs that process and is told of; the others go on.
"""

import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import wait

from rl.rewards.claim import Found
from rl.rewards.process import JudgeError, Process
from rl.rewards.worker import TOGETHER, Call, Wanted, late

_PATIENCE = 60.0  # seconds of one call before it is said that it is still under way
_BUSY = 0.5  # seconds of work after which other processes are worth their start
_GRACE = 5.0  # seconds in which a process says itself which of its async calls are late


class ImportFailed(Exception):
    """Says which functions (a slice of all: one, or all where the process ended) cannot be imported or called, and how that
    went."""

    def __init__(self, which: slice, how: str) -> None:
        super().__init__(which, how)
        self.which, self.how = which, how


class Pool:
    """Calls functions in up to `workers` processes: the first is there from the beginning, others when there is work."""

    def __init__(self, wanted: Sequence[Wanted], workers: int, timeout: float, total: float) -> None:
        """Imports the functions. ImportFailed where one cannot be imported, or is called in no style that is known.

        timeout  seconds of one call
        total    seconds of all calls that are asked for together
        """
        self._wanted, self.workers, self.timeout, self.total = wanted, workers, timeout, total
        self.ready: list[Process] = []
        self.loading: list[Process] = [Process(wanted)]
        begun = told = time.monotonic()
        while not self.ready:
            if (process := self.loading[0]).pipe.poll(1.0) or process.has_ended:
                self.loaded(process)
            elif (now := time.monotonic()) - told > _PATIENCE:
                told = now
                print(f"still waiting for the import of {wanted[0].function} ({now - begun:.0f} s)", flush=True)

    def __call__(self, calls: Sequence[Call], until_error: bool) -> list[list[Found]]:
        """Returns what each call finds for each of its claims, in the order of the calls; `until_error`: up to the first call,
        in that order, with an error."""
        work = _Work(self, calls, until_error)
        try:
            return work.done()
        finally:
            for process in work.busy:  # after an error, or an interrupt
                self.remove(process)

    def loaded(self, process: Process) -> None:
        """Takes the answer of a process that was loading."""
        self.loading.remove(process)
        try:
            if process.has_ended and not process.pipe.poll():  # a process that it has forked may hold the pipe
                raise JudgeError(process.how_it_ended())
            answer = process.receive()
        except JudgeError as error:
            raise ImportFailed(slice(None), str(error)) from None
        if isinstance(answer, tuple):
            process.close()
            at, how = answer
            raise ImportFailed(slice(at, at + 1), how)
        self.kinds = answer
        self.ready.append(process)

    def free(self, busy: "dict[Process, list[int]]") -> Process | None:
        """Returns a process that is ready and has nothing to do."""
        for process in [p for p in self.ready if p not in busy and p.has_ended]:
            self.remove(process)
        return next((p for p in self.ready if p not in busy), None)

    def grow(self, useful: int) -> None:
        """Starts processes until there are as many as are useful, or allowed."""
        while len(self.ready) + len(self.loading) < min(self.workers, useful):
            self.loading.append(Process(self._wanted))

    def remove(self, process: Process) -> None:
        """Ends a process."""
        process.kill()
        self.ready.remove(process)


class _Work:
    """Takes one batch of calls through the processes of a pool."""

    def __init__(self, pool: Pool, calls: Sequence[Call], until_error: bool) -> None:
        self._pool, self._calls, self._until_error = pool, calls, until_error
        self._waiting = deque(range(len(calls)))
        self._alone: set[int] = set()  # calls that were lost together: which one was it?
        self.busy: dict[Process, list[int]] = {}
        self._found: dict[int, list[Found]] = {}
        self._end = len(calls)  # no call from here on is of interest
        self._begun = self._told = time.monotonic()

    def done(self) -> list[list[Found]]:
        """Works until every call has an answer."""
        answered = 0
        while answered < self._end:
            if answered in self._found:
                answered += 1
                continue
            self._hand_out()
            self._listen()
            self._look_at_the_clock()
        return [self._found[i] for i in range(self._end)]

    def _hand_out(self) -> None:
        while self._waiting and self._waiting[0] < self._end:
            if (process := self._pool.free(self.busy)) is None:
                long = time.monotonic() - self._begun > _BUSY
                self._pool.grow(len(self.busy) + len(self._waiting) if long else 1)
                return
            self.busy[process] = chosen = self._take()
            try:
                process.ask([self._calls[i] for i in chosen], self._pool.timeout)
            except JudgeError as error:
                self._lost(process, str(error))

    def _take(self) -> list[int]:
        """Takes the next call, or as many async ones as one process awaits together."""
        chosen = [self._waiting.popleft()]
        share = min(TOGETHER, -(-(len(self._waiting) + 1) // self._pool.workers))
        while (
            self._waiting and len(chosen) < share and self._is_shared(chosen[0]) and self._is_shared(self._waiting[0])
        ):
            chosen.append(self._waiting.popleft())
        return chosen

    def _is_shared(self, i: int) -> bool:
        return self._is_async(i) and i not in self._alone

    def _is_async(self, i: int) -> bool:
        return bool(self._pool.kinds[self._calls[i].function].is_async)

    def _listen(self) -> None:
        """Waits until a process has something to say, or a clock must be looked at."""
        now = time.monotonic()
        ends = [self._begun + self._pool.total, *(p.since + self._limit(p) for p in self.busy)]
        pause = min(1.0, _BUSY if now - self._begun < _BUSY else 1.0, *(end - now for end in ends))
        ready = wait([p.pipe for p in (*self.busy, *self._pool.loading)], max(0.0, pause))
        for process in [p for p in self._pool.loading if p.pipe in ready or p.has_ended]:
            self._pool.loaded(process)
        for process in list(self.busy):
            if process.pipe in ready:
                self._collect(process)
            elif process.has_ended:  # a process that it has forked may hold the pipe
                self._lost(process, process.how_it_ended())

    def _collect(self, process: Process) -> None:
        try:
            answers = process.receive()
        except JudgeError as error:
            self._lost(process, str(error))
            return
        self._told = time.monotonic()
        for i, found in zip(self.busy.pop(process), answers, strict=True):
            self._answer(i, found)

    def _answer(self, i: int, found: list[Found]) -> None:
        self._found[i] = found
        if self._until_error and any(f.error for f in found):
            self._end = min(self._end, i + 1)

    def _lost(self, process: Process, how: str) -> None:
        """Ends a process that was lost over its calls; several calls are made again, each alone."""
        calls = self.busy.pop(process)
        self._pool.remove(process)
        if len(calls) == 1:
            self._answer(calls[0], self._failed(calls[0], how))
        else:
            self._alone.update(calls)
            self._waiting = deque(sorted((*calls, *self._waiting)))

    def _look_at_the_clock(self) -> None:
        now, total = time.monotonic(), self._pool.total
        for process in [p for p in self.busy if now - p.since > self._limit(p)]:
            self._lost(process, late(self._pool.timeout))
        if now - self._begun > total:
            self._waiting.clear()
            how = f"was not done within {total:g} s of its batch (scoring.total; a clock decides that)"
            for i in [i for i in range(self._end) if i not in self._found]:
                self._answer(i, self._failed(i, how))
        elif self.busy and now - self._told > _PATIENCE:
            self._told = now
            process, calls = min(self.busy.items(), key=lambda item: item[0].since)
            problem = self._calls[calls[0]].claims[0].problem
            print(f"still waiting for the reward of problem {problem.id!r} ({now - process.since:.0f} s)", flush=True)

    def _limit(self, process: Process) -> float:
        waits_itself = self._is_async(self.busy[process][0])
        return self._pool.timeout + (_GRACE if waits_itself else 0.0)

    def _failed(self, i: int, how: str) -> list[Found]:
        return [Found(error=how)] * len(self._calls[i].claims)
