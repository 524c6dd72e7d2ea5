"""Measures how often drafts are right."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

MEMORY = 64
"""Tokens after which what is older counts half."""


@dataclass
class _Rate:
    right: float = 0.0
    tried: float = 0.0


class Acceptance:
    """Estimates, by kind of draft, the chance that its next token is right where all before it are."""

    def __init__(self) -> None:
        self._rates: dict[tuple[str, int], _Rate] = {}

    def chance(self, kind: tuple[str, int]) -> float:
        """Returns the mean of a beta distribution that begins as the uniform one: 1/2 where nothing is known."""
        rate = self._rates.get(kind, _Rate())
        return (rate.right + 1) / (rate.tried + 2)

    def score(self, kind: tuple[str, int], draft: Many[int], said: Many[int]) -> None:
        """Counts a draft, of whose tokens the sequence has `said` as many as there are."""
        right = 0
        while right < min(len(draft), len(said)) and draft[right] == said[right]:
            right += 1
        rate = self._rates.setdefault(kind, _Rate())
        rate.right += right
        rate.tried += right + (right < min(len(draft), len(said)))
        if rate.tried > MEMORY:
            rate.right, rate.tried = rate.right / 2, rate.tried / 2
