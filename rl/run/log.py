"""Writes what a run leaves behind while it runs: metrics.jsonl, completions.jsonl, summary.json, and shows it to the trackers
that the config names (`trackers/`).

The files are the record; a tracker is a view of it. Nothing that one does or fails to do decides a result, so a failure there
is one line on stderr and the run goes on.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rl.metrics import Badness
from rl.report.folder import badness, lines
from rl.run.files import strict, write_atomic
from rl.run.trackers import TABLE_COLUMNS, Tracker, open_tracker

TABLE_ROWS = 256
"""Completions in a tracker's table: the last ones of the run."""


class RunLog:
    """Keeps the log of one run in `out_dir`. Rows are appended: a resumed run continues the files it finds.

    Use it as a context manager, or call `finish` (the run is done) or `close` (it is not) yourself.
    """

    def __init__(
        self,
        out_dir: Path,
        config: Mapping[str, Any],
        trackers: Sequence[str] = (),
        name: str | None = None,
        positions: Mapping[str, int] | None = None,
    ) -> None:
        """`trackers`: of `rl.run.trackers.TRACKERS`. `positions`: bytes of each file that this run goes on from; the rest of it
        is cut off."""
        self.out_dir = Path(out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        ends = positions or {}
        self._metrics, self._completions = self._files = [
            _open_lines(self.out_dir / name, ends.get(name)) for name in ("metrics.jsonl", "completions.jsonl")
        ]
        self._table: deque[list[Any]] = deque(maxlen=TABLE_ROWS)
        self.worst: Badness | None = None
        """Of the completions so far (rl.metrics.worst): one that is worse is to be logged as it happens."""
        for row in lines(self.out_dir / "completions.jsonl") if ends.get("completions.jsonl") else ():
            self._remember(row)
        self._trackers: dict[str, Tracker] = {}
        for kind in trackers:
            self._start(kind, strict(config), name or self.out_dir.name)

    @property
    def shown_at(self) -> dict[str, str]:
        """Returns where each tracker shows the run: a URL, or a folder."""
        return {kind: tracker.where for kind, tracker in self._trackers.items()}

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends {"step": step, **metrics} as one line of strict JSON: NaN and ±inf become null."""
        self._write(self._metrics, {"step": step} | {k: v for k, v in metrics.items() if k != "step"})
        # no curves: counts by class, and from when to when a phase went on
        shown = {k: v for k, v in metrics.items() if not k.startswith(("divergence/by_", "time/spans"))}
        self._tell("stopped", lambda tracker: tracker.step(step, shown))

    def alert(self, title: str, text: str) -> None:
        """Makes the trackers that can tell the user at once."""
        self._tell("could not alert", lambda tracker: tracker.alert(title, text))

    def completions(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends sampled completions, one {"step": step, **row} a line.

        The report reads prompt, completion, answer, reward, and for the token view tokens (ids or texts), logprobs
        (rollout) and trainer_logprobs, all [T] over the response, and optionally token_texts [T] beside ids.
        """
        for row in rows:
            row = {"step": step} | {k: v for k, v in row.items() if k != "step"}
            self._write(self._completions, row)
            self._remember(row)

    def positions(self) -> dict[str, int]:
        """Returns the bytes of each file so far, all of them on the disk."""
        for file in self._files:
            os.fsync(file.fileno())
        return {Path(file.name).name: os.fstat(file.fileno()).st_size for file in self._files}

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json whole or not at all, ends the trackers, closes the files."""
        write_atomic(self.out_dir / "summary.json", json.dumps(strict(summary), indent=2, allow_nan=False) + "\n")
        self._tell("stopped", lambda tracker: tracker.summarise(strict(summary), list(self._table)))
        self.close(exit_code=0)

    def close(self, exit_code: int = 1) -> None:
        """Closes the files and ends the trackers with their processes; `exit_code` 1 marks the run there as failed."""
        self._metrics.close()
        self._completions.close()
        self._tell("did not end cleanly", lambda tracker: tracker.close(exit_code))
        self._trackers = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()  # after finish() there is nothing left to do

    def _start(self, kind: str, config: dict[str, Any], name: str) -> None:
        try:
            self._trackers[kind] = open_tracker(kind, self.out_dir, config, name)
        except Exception as error:  # they raise many kinds; none may end a training run
            _say(kind, "did not start", error)

    def _tell(self, event: str, tell: Callable[[Tracker], None]) -> None:
        for kind, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:
                del self._trackers[kind]
                _say(kind, event, error)
                tracker.abandon()

    def _remember(self, row: Mapping[str, Any]) -> None:
        self._table.append([strict(row.get(column)) for column in TABLE_COLUMNS])
        if (found := badness(row)) is not None and (self.worst is None or found > self.worst):
            self.worst = found

    def _write(self, file: Any, row: Mapping[str, Any]) -> None:
        file.write(json.dumps(strict(row), allow_nan=False) + "\n")
        file.flush()


def _say(kind: str, event: str, error: Exception) -> None:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    print(f"{kind} {event} ({reason[:300]}); logging goes on to metrics.jsonl", file=sys.stderr, flush=True)


def _open_lines(path: Path, end: int | None = None) -> Any:
    """`path` open for appending lines, at `end` where it holds more. A run that was killed may have left half a line at the
    end: it is cut off."""
    if path.exists():
        with open(path, "rb+") as file:
            data = file.read(end)
            file.truncate(data.rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8")
