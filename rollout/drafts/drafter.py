"""Defines a draft, and what drafts."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from rollout.sequence import Sequence


@dataclass(frozen=True)
class Draft:
    """Holds tokens that may follow those of a sequence. `source`: whose idea it is, to be counted; `grade`: among the drafts of
    that source those of equal grade are about as often right, which is measured."""

    tokens: Many[int]
    source: str
    grade: int = 0


class Drafter(Protocol):
    """Guesses. A draft may be anything: the engine keeps the tokens that it draws itself at the same places, and no others.

    Every rank of a tensor-parallel engine has a drafter of its own and checks its drafts in one batch with the others', so what
    it says must follow from the tokens that it has been shown, and not from a clock, an order of threads or the rank."""

    def draft(self, sequences: Many[Sequence], most: int) -> Many[Draft | None]:
        """Returns up to `most` tokens after `tokens` of each sequence, or None where it has no idea."""

    def ended(self, sequence: Sequence) -> None:
        """Hears of a sample that is complete."""
