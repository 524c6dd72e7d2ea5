"""Tokens to text while they are sampled, and the stop texts found in it."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, a pure function."""

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the bytes so far end inside a character


class TextStream:
    """The text of a growing list of tokens, decoded a few tokens at a time.

    The text depends on the tokens alone, so every rank finds the same stop at the same token. What a token adds to the text is
    what decoding it after the tokens of the last step adds; a token that ends inside a character adds nothing until a later one
    completes it.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), keep_stop: bool = False) -> None:
        self.decode, self.stops, self.keep_stop = decode, stops, keep_stop
        self.ids: list[int] = []
        self.text = ""
        self.matched: str | None = None  # the stop text that was found; `text` is cut before or, `keep_stop`, after it
        self._shown = 0  # characters that `take` has given
        self._context = self._read = 0  # ids[context:read] are in the text, and are decoded again before what follows

    def push(self, token: int) -> None:
        self.ids.append(token)
        self._extend(final=False)

    def finish(self) -> None:
        """No token follows: what is left inside a character becomes a replacement character."""
        if self.matched is None:
            self._extend(final=True)

    def take(self) -> str:
        """What was added since the last call and cannot become part of a stop text."""
        end = len(self.text)
        if self.matched is None:
            end -= max((_overlap(self.text, stop) for stop in self.stops), default=0)
        return self._show(max(end, self._shown))

    def rest(self) -> str:
        """What was added since the last call of `take`, after `finish`."""
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        new, self._shown = self.text[self._shown : end], max(self._shown, end)
        return new

    def _extend(self, final: bool) -> None:
        before = self.decode(self.ids[self._context : self._read])
        after = self.decode(self.ids[self._context :])
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not final):
            return
        start = len(self.text)
        self.text += after[len(before) :]
        self._context, self._read = self._read, len(self.ids)
        found = [(at, i) for i, stop in enumerate(self.stops) if (at := self._find(stop, start)) >= 0]
        if found:  # the earliest; of those that begin together, the first named
            at, i = min(found)
            self.matched = self.stops[i]
            self.text = self.text[: at + len(self.matched) * self.keep_stop]

    def _find(self, stop: str, start: int) -> int:
        return self.text.find(stop, max(0, start - len(stop) + 1))


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


def decode_all(decode: Decode, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of a finished sample, as its stream gave it, cut before the stop text that ended it."""
    stream = TextStream(decode, stops)
    for token in ids:
        stream.push(token)
    stream.finish()
    return stream.text
