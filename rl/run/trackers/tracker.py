"""Says what a tracker is."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

TABLE_COLUMNS = ("step", "prompt", "completion", "answer", "reward")
"""Of the table of completions at the end of a run."""


class Tracker(Protocol):
    """Shows a run elsewhere. Any method may raise: the run then goes on without it."""

    @property
    def where(self) -> str:
        """Returns where the run is shown: a URL, or a folder."""

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows the metrics of a step: numbers, texts, or what this tracker cannot show and leaves out."""

    def alert(self, title: str, text: str) -> None:
        """Tells the user at once, where the tracker can. `title`: below 64 characters."""

    def summarise(self, summary: Mapping[str, Any], completions: Sequence[Sequence[Any]]) -> None:
        """Shows what a finished run ended with; `completions`: rows of TABLE_COLUMNS."""

    def close(self, exit_code: int) -> None:
        """Ends the run there; 0: it is finished."""

    def abandon(self) -> None:
        """Ends what the tracker started, after it failed; raises nothing."""


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Keeps the metrics that are numbers."""
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
