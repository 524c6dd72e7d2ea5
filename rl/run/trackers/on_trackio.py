"""Shows a run in Trackio: `trackio show`. Local, without an account."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trackio

from rl.run.trackers.tracker import TABLE_COLUMNS, numbers


class TrackioTracker:
    """Writes into Trackio's database, in TRACKIO_DIR or the Hugging Face cache. TRACKIO_PROJECT names the project."""

    def __init__(self, out_dir: Path, config: dict[str, Any], name: str) -> None:
        self._project = os.environ.get("TRACKIO_PROJECT", "samebit")
        trackio.init(project=self._project, name=name, config=config, resume="allow", auto_log_gpu=False)

    @property
    def where(self) -> str:
        """Returns how to look at the run."""
        return f"trackio show --project {self._project}"

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs every number."""
        trackio.log(numbers(metrics), step=step)

    def alert(self, title: str, text: str) -> None:
        """Makes Trackio print and keep the alert."""
        trackio.alert(title, text=text, level=trackio.AlertLevel.ERROR)

    def summarise(self, summary: Mapping[str, Any], completions: Sequence[Sequence[Any]]) -> None:
        """Logs the summary's numbers and a table of completions."""
        trackio.log({f"summary/{k}": v for k, v in numbers(summary).items()})
        if completions:
            rows = [list(map(str, row)) for row in completions]
            trackio.log({"completions": trackio.Table(columns=list(TABLE_COLUMNS), data=rows)})

    def close(self, exit_code: int) -> None:
        """Ends the run there."""
        trackio.finish()

    def abandon(self) -> None:
        """Does nothing: the next run begins anew."""
