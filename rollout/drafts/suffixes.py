"""Finds where the end of a text stood before, in this text and in others."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

GRAM = 3
"""Tokens that must be equal at the least."""

REACH = 8
"""Tokens that are compared at the most: which of several places is longest in common beyond them says little."""

LATEST = 16
"""Places that are looked at, the latest of those after the same last tokens."""


@dataclass(frozen=True)
class Match:
    """Says that text `text` has at `place` what may follow, and before it `length` tokens in common with the end that was
    looked up."""

    text: int
    place: int
    length: int


class Suffixes:
    """Indexes texts of tokens, which may grow at their ends: every place of them by the `GRAM` tokens before it. A token costs
    one entry, a look-up the comparison of `LATEST` places at most."""

    def __init__(self) -> None:
        self.texts: list[Many[int]] = []
        self._next: list[int] = []  # of each text, the first place that is not indexed
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def add(self, text: Many[int], first: int = 0) -> int:
        """Adds a text, of which only places from `first` on are found, and returns its number. It is not copied: `extend` reads
        what has been appended."""
        self.texts.append(text)
        self._next.append(max(first, GRAM))
        self.extend(len(self.texts) - 1)
        return len(self.texts) - 1

    def extend(self, number: int) -> None:
        """Indexes what has been appended to a text."""
        text = self.texts[number]
        for place in range(self._next[number], len(text) + 1):
            self._places.setdefault(tuple(text[place - GRAM : place]), []).append((number, place))
        self._next[number] = max(self._next[number], len(text) + 1)

    def find(self, tokens: Many[int]) -> Match | None:
        """Looks among the `LATEST` places after the last `GRAM` of `tokens`, those without a token leaving out, for the ones
        that have the most tokens before them in common with the end of `tokens`, of which `REACH` count. Of these it takes the
        next token that most of them have, the latest such where several are equal, and the latest place of it."""
        tail = list(tokens[-REACH:])
        best: list[Match] = []  # the latest first
        for number, place in self._latest(tail):
            length = self._common(tail, number, place)
            if best and length < best[0].length:
                continue
            if best and length > best[0].length:
                best.clear()
            best.append(Match(number, place, length))
        votes: dict[int, int] = {}
        for match in best:
            token = self.texts[match.text][match.place]
            votes[token] = votes.get(token, 0) + 1
        return max(best, key=lambda m: votes[self.texts[m.text][m.place]], default=None)

    def _latest(self, tail: list[int]) -> list[tuple[int, int]]:
        known = self._places.get(tuple(tail[-GRAM:]), ()) if len(tail) >= GRAM else ()
        out: list[tuple[int, int]] = []
        for number, place in reversed(known):
            if place < len(self.texts[number]):
                out.append((number, place))
                if len(out) == LATEST:
                    break
        return out

    def _common(self, tail: list[int], number: int, place: int) -> int:
        text, most = self.texts[number], min(len(tail), place)
        for length in range(GRAM, most):
            if text[place - 1 - length] != tail[-1 - length]:
                return length
        return most
