"""Tells whoever watches how far a run is: in a terminal, in what a terminal's output is sent to, and in a log file."""

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from kernels.host.command import warn


class Screen(Console):
    """Prints lines that stand in a log file too, with their time, once there is one. A line is one line, however narrow the
    console, and its brackets are no markup."""

    def __init__(self, **more: Any) -> None:
        super().__init__(highlight=False, **more)
        self._log: Path | None = None
        self._before: list[str] = []  # what was said before there was a file
        self._noting = threading.Lock()  # of whoever waits, too

    def print(self, *objects: Any, **more: Any) -> None:
        """Prints at once; lines of text are noted."""
        if not all(isinstance(o, str) for o in objects) or not objects:
            return super().print(*objects, **more)
        super().print(*objects, **{"soft_wrap": True, "markup": False} | more)
        self.file.flush()
        self.note(" ".join(objects))

    def note(self, line: str) -> None:
        """Writes a line into the log file alone."""
        with self._noting:
            self._before.append(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n")
            if self._log:
                with open(self._log, "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(self._before)
                self._before.clear()

    def warn(self, text: str) -> None:
        """Prints a warning on stderr."""
        warn(text)
        self.note(f"warning: {text}")

    @contextlib.contextmanager
    def keep(self, path: Path) -> Iterator[None]:
        """Notes in `path` from here on, after what was said before, and if what is done inside fails, why."""
        self._log = path
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # of a full disk, say, which may be why
                self.note(f"stopped by {type(error).__name__}: {' '.join(str(error).split())}")
            raise


FIRST, NEXT = 2.0, 30.0  # seconds until what is being done is said, and said again


class Waiting:
    """Says what is being done where that takes long, with how much of `total` is `done`; all three may change meanwhile."""

    def __init__(self, console: Console | None, what: str, total: int = 0, first: float | None = None) -> None:
        self.what, self.done, self.total = what, 0, total
        self._console, self._first = console, first
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
        pause = self._first or FIRST
        while not self._over.wait(pause):
            so_far = f"{self.done:,} of {self.total:,}, " if self.total else ""
            assert self._console
            with contextlib.suppress(OSError):  # of a full disk: the run's own next line says so
                self._console.print(f"{self.what} ({so_far}{time.monotonic() - self._start:.0f} s)", soft_wrap=True)
            pause = NEXT


class Bar:
    """Shows steps of one kind: a live bar on a terminal, elsewhere a line a step, which the log file has in any case.

    Called with (done, total, what to show) after a step.
    """

    def __init__(self, screen: Screen, name: str) -> None:
        self._screen, self._name, self._step = screen, name, ""
        self._start, self._first = time.monotonic(), 0
        self._live = _Live(screen) if screen.is_terminal else None

    def __enter__(self) -> "Bar":
        if self._live:
            self._live.start()
            self._task = self._live.add_task(self._name, total=None)
        return self

    def __call__(self, done: int, total: int, note: str) -> None:
        self._first = self._first or done  # a run that goes on does not begin at 1
        seconds = (time.monotonic() - self._start) / (done - self._first + 1) * (total - done)
        line = f"{self._name} {done}/{total}  {note}  eta {timedelta(seconds=round(seconds))}"
        if self._live:
            self._live.below = Text(
                f"{note}  eta {timedelta(seconds=round(seconds))}", style="dim", overflow="ellipsis"
            )
            self._live.update(self._task, completed=done, total=total)
            self._screen.note(line)
        else:
            self._screen.print(line)

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Shows what a step is at; where that takes long, says so."""
        if self._live:
            self._live.update(self._task, phase=what)
        with Waiting(self._screen, f"{self._name}: {what}", first=NEXT):
            yield

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()


class _Live(Progress):
    """One bar, and a line below it."""

    below: RenderableType = ""

    def __init__(self, screen: Screen) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        super().__init__(*columns, TextColumn("{task.fields[phase]}"), console=screen)

    def add_task(self, description: str, *args: Any, **fields: Any) -> Any:
        return super().add_task(description, *args, phase="", **fields)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield self.below
