"""Tokens to text while they are sampled, and the stop texts found in it."""

from collections.abc import Callable, Sequence
from functools import lru_cache

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, a pure function."""

_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTE_LETTERS = {b: chr(b) for b in _PLAIN} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*_PLAIN}))}
"""The letter that stands for a byte in vocabularies of bytes, as in GPT-2's: itself, or, where that is invisible, one above."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the bytes so far end inside a character
_INSIDE = 3  # tokens at most that a character may wait for: it has four bytes
_CROWD = 8  # tokens without text of their own that are decoded together


class TextStream:
    """Decodes the text of a growing list of tokens, decoded a few tokens at a time: a token costs what it adds, however long
    the text.

    The text depends on the tokens alone, so every rank finds the same stop at the same token. What a token adds to the text is
    what decoding it after the tokens of the last step adds; a token that ends inside a character adds nothing until a later one
    completes it.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), keep_stop: bool = False) -> None:
        self.decode, self.stops, self.keep_stop = decode, stops, keep_stop
        self.matched: str | None = None  # the stop text that was found; the text ends before or, `keep_stop`, after it
        self.length = 0  # characters of all tokens so far
        self._held = ""  # the end of the text, that may be the beginning of a stop
        self._ids: list[int] = []  # those of the last step, which are in the text, and those after it, which are not
        self._read = 0  # how many are in the text
        self._before = ""  # what these decode to
        self._begun = [0] * len(stops)  # letters of each stop that the text ends with
        self._borders = [_borders(stop) for stop in stops]

    def push(self, token: int) -> str:
        """Returns what can be shown now: text that is complete and cannot become part of a stop."""
        if self.matched is not None:
            return ""
        self._ids.append(token)
        return self._show(self._new(final=False))

    def finish(self) -> str:
        """Returns the rest. No token follows: what is left inside a character becomes a replacement character."""
        if self.matched is not None:
            return ""
        shown = self._show(self._new(final=True)) + self._held
        self._held = ""
        return shown

    def _new(self, final: bool) -> str:
        stop, after = len(self._ids), self.decode(self._ids)
        crowd = stop - self._read > _CROWD
        if after.endswith(_UNFINISHED) and not final:
            if not crowd:
                return ""
            stop -= _INSIDE  # what is before these is no character that anything could complete
            after = self.decode(self._ids[:stop])
        new = after[len(self._before) :]
        if new:
            self._ids, self._read = self._ids[self._read :], stop - self._read
            self._before = self.decode(self._ids[: self._read])
        elif crowd and stop == len(self._ids):
            self._ids.pop()  # one of a row of tokens without text, such as ends of text that are ignored
        return new

    def _show(self, new: str) -> str:
        text, start = self._held + new, self.length - len(self._held)
        found = [(end - len(stop), i) for i, stop in enumerate(self.stops) if (end := self._end(i, new))]
        self.length += len(new)
        if found:  # the earliest; of those that begin together, the first named
            at, i = min(found)
            self.matched, self._held = self.stops[i], ""
            return text[: at + len(self.matched) * self.keep_stop - start]
        shown = len(text) - max(self._begun, default=0)
        self._held = text[shown:]
        return text[:shown]

    def _end(self, i: int, new: str) -> int:
        """Where the i-th stop first ends in `new`, counted from the beginning of the text; 0: it does not. The automaton of
        Knuth, Morris and Pratt (1977): a letter costs the same however long the stop is."""
        stop, borders, begun = self.stops[i], self._borders[i], self._begun[i]
        if not begun and stop[0] not in new:
            return 0
        for place, letter in enumerate(new, self.length + 1):
            while begun and stop[begun] != letter:
                begun = borders[begun]
            begun += stop[begun] == letter
            if begun == len(stop):
                return place
        self._begun[i] = begun
        return 0


@lru_cache(maxsize=256)
def _borders(stop: str) -> list[int]:
    """For each number of letters of `stop`: the longest shorter beginning of it that these end with."""
    borders, length = [0, 0], 0
    for letter in stop[1:]:
        while length and stop[length] != letter:
            length = borders[length]
        length += stop[length] == letter
        borders.append(length)
    return borders


def decode_all(decode: Decode, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """Returns the text of a finished sample, as its stream gave it, cut before the stop text that ended it."""
    stream = TextStream(decode, stops)
    return "".join([*map(stream.push, ids), stream.finish()])
