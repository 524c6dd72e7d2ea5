"""Shows a run in TensorBoard: `tensorboard --logdir OUT_DIR`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from rl.run.trackers.tracker import TABLE_COLUMNS, numbers


class TensorboardTracker:
    """Writes event files into out_dir/tensorboard. A resumed run adds one; TensorBoard shows the later value of a step."""

    def __init__(self, out_dir: Path, config: dict[str, Any], name: str) -> None:
        self._folder = out_dir / "tensorboard"
        self._writer = SummaryWriter(str(self._folder), flush_secs=10)
        self._writer.add_text("config", _code(json.dumps(config, indent=2)), 0)

    @property
    def where(self) -> str:
        """Returns the folder of the event files."""
        return str(self._folder)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes every number as a scalar."""
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def alert(self, title: str, text: str) -> None:
        """Writes the alert as a text: TensorBoard tells nobody."""
        self._writer.add_text("alert", f"**{title}**\n\n{text}")
        self._writer.flush()

    def summarise(self, summary: Mapping[str, Any], completions: Sequence[Sequence[Any]]) -> None:
        """Writes the summary and the completions as texts."""
        self._writer.add_text("summary", _code(json.dumps(summary, indent=2)))
        rows = [json.dumps(dict(zip(TABLE_COLUMNS, row, strict=True)), ensure_ascii=False) for row in completions]
        if rows:
            self._writer.add_text("completions", _code("\n".join(rows)))

    def close(self, exit_code: int) -> None:
        """Writes what is left."""
        self._writer.close()

    def abandon(self) -> None:
        """Does nothing: there is no process to end."""


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
