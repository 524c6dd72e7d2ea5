"""Key-value pages: who owns them, and which hold a prefix that others can share.

A page is `page_size` consecutive positions of one sequence. A full page, once computed, is a node of a radix tree over
token ids; a later sequence with the same prefix takes a reference instead of computing it. That changes no bit: keys
depend on their prefix alone. Pages that nobody refers to stay as cache until they are needed, oldest first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

_ROOT = 0


@dataclass(frozen=True)
class _Node:
    id: int
    page: int
    key: tuple[int, tuple[int, ...]]  # (id of the parent node, tokens of the page)


@dataclass
class Path:
    """Remembers the nodes of a sequence's first pages, so that what is known of them is not looked up again."""

    nodes: list[int] = field(default_factory=list)
    evictions: int = 0  # of the pool when this was last known to be true


class PagePool:
    """Keeps the books of `pages` pages of `page_size` tokens. Pure bookkeeping; the rows themselves live in PagedCache."""

    def __init__(self, pages: int, page_size: int, prefix_cache: bool = True) -> None:
        self.pages, self.page_size, self.prefix_cache = pages, page_size, prefix_cache
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages
        self._nodes: dict[tuple[int, tuple[int, ...]], _Node] = {}
        self._node_of: dict[int, _Node] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached pages without a reference, oldest first
        self._alive: set[int] = set()  # ids of nodes
        self._next_id = _ROOT + 1
        self._evictions = 0
        self.hit_tokens = 0

    @property
    def available(self) -> int:
        """Counts the pages that `take` can still hand out."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Counts the pages that so many tokens fill, the last one perhaps in part."""
        return -(-tokens // self.page_size)

    def match(self, tokens: Sequence[int], path: Path | None = None) -> list[int]:
        """Takes references to the cached pages of the longest prefix of `tokens`; at least one token is left to compute. `path`
        becomes that of these pages."""
        found: list[int] = []
        nodes: list[int] = []
        parent = _ROOT
        while self.prefix_cache and (len(found) + 1) * self.page_size < len(tokens):
            start = len(found) * self.page_size
            node = self._nodes.get((parent, tuple(tokens[start : start + self.page_size])))
            if node is None:
                break
            found.append(node.page)
            parent = node.id
            nodes.append(parent)
        if path is not None:
            path.nodes, path.evictions = nodes, self._evictions
        for page in found:
            self._references[page] += 1
            self._idle.pop(page, None)
        self.hit_tokens += len(found) * self.page_size
        return found

    def take(self, count: int) -> list[int] | None:
        """Returns `count` fresh pages with one reference each, or None (and nothing taken) if so many are not to be had."""
        if count > self.available:
            return None
        while len(self._free) < count:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._free.append(page)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken

    def publish(self, tokens: Sequence[int], pages: Sequence[int], path: Path | None = None) -> None:
        """Makes the full pages of a computed prefix `tokens` findable. A page whose prefix is known already stays private.
        `path`: what an earlier call for the same sequence left, and this one leaves."""
        path = path or Path()
        if path.evictions != self._evictions:
            path.nodes = list(takewhile(self._alive.__contains__, path.nodes))
            path.evictions = self._evictions
        parent = path.nodes[-1] if path.nodes else _ROOT
        for i in range(len(path.nodes), len(tokens) // self.page_size if self.prefix_cache else 0):
            key = (parent, tuple(tokens[i * self.page_size : (i + 1) * self.page_size]))
            node = self._nodes.get(key)
            if node is None:
                if pages[i] in self._node_of:
                    return  # this page is cached below another parent: its chain was evicted above it
                node = _Node(self._next_id, pages[i], key)
                self._next_id += 1
                self._nodes[key] = self._node_of[pages[i]] = node
                self._alive.add(node.id)
            parent = node.id
            path.nodes.append(parent)

    def release(self, pages: Sequence[int]) -> None:
        """Gives back one reference to each page, the last first, so that a prefix outlives what follows it."""
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._node_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def clear(self) -> None:
        """Forgets every cached prefix (the weights changed). Pages in use stay with their owners."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._nodes.clear()
        self._node_of.clear()
        self._alive.clear()
        self._evictions += 1

    def _forget(self, page: int) -> None:
        node = self._node_of.pop(page)
        del self._nodes[node.key]
        self._alive.remove(node.id)
        self._evictions += 1
