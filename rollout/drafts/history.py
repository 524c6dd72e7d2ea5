"""Keeps what was said after a prompt before, in bounded memory."""

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence as Many

TOKENS = 1 << 22
"""Tokens that are kept: 16 MiB, and some 100 bytes a completion."""

EACH = 16
"""Completions of one prompt that are kept, the latest."""


class History:
    """Keeps completions by prompt. Where there are too many tokens, the prompts that were met least recently go as a whole."""

    def __init__(self, tokens: int = TOKENS, each: int = EACH) -> None:
        self.most, self.each = tokens, each
        self.tokens = 0
        self.asked = self.found = 0  # prompts that were looked up, and of these the ones that were known
        self._kept: OrderedDict[int, deque[array[int]]] = OrderedDict()  # the prompt that was met last is last

    def add(self, prompt: Many[int], completion: Many[int]) -> None:
        """Keeps a completion, unless it alone is too long."""
        if not completion or len(completion) > self.most:
            return
        key = hash(tuple(prompt))  # of two prompts with one hash each may be guessed from, at no cost but a wrong guess
        kept = self._kept.setdefault(key, deque())
        self._kept.move_to_end(key)
        kept.append(array("i", completion))
        self.tokens += len(completion)
        if len(kept) > self.each:
            self.tokens -= len(kept.popleft())
        while self.tokens > self.most:
            first = next(iter(self._kept))
            self.tokens -= len(self._kept[first].popleft()) if first == key else sum(map(len, self._kept.pop(first)))

    def of(self, prompt: Many[int]) -> list[Many[int]]:
        """Returns the completions of a prompt that are kept, the oldest first."""
        key = hash(tuple(prompt))
        self.asked += 1
        if key not in self._kept:
            return []
        self.found += 1
        self._kept.move_to_end(key)
        return list(self._kept[key])
