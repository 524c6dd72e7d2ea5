"""How far a phase of the run is, for whoever watches."""

import sys

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
