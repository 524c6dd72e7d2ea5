"""How far a phase of the run is, for whoever watches."""

import sys
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
    """A bar on a terminal; elsewhere a line now and then. Called with (done, total, what to show)."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        columns = (
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar = Progress(*columns, console=console) if console.is_terminal else None

    def __enter__(self) -> "Bar":
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.name, note="")
        return self

    def __call__(self, done: int, total: int, note: str) -> None:
        if self.bar:
            self.bar.update(self.task, completed=done, total=total, note=note)
        elif done == total or done % max(1, total // 10) == 0:
            self.console.print(f"{self.name} {done}/{total}  {note}")
            sys.stdout.flush()

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()


FIRST, NEXT = 2.0, 30.0  # seconds until what is being done is said, and said again


class Waiting:
    """Says what is being done where that takes long, with how much of `total` is `done`."""

    def __init__(self, console: Console | None, what: str, total: int = 0) -> None:
        self.done = 0
        self._console, self._what, self._total = console, what, total
        self._over, self._start = threading.Event(), time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Waiting":
        if self._console:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._console:
            self._thread.join()

    def _watch(self) -> None:
        pause = FIRST
        while not self._over.wait(pause):
            so_far = f"{self.done:,} of {self._total:,}, " if self._total else ""
            assert self._console
            self._console.print(f"{self._what} ({so_far}{time.monotonic() - self._start:.0f} s)", soft_wrap=True)
            sys.stdout.flush()
            pause = NEXT
