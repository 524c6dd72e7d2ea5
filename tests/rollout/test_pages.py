"""PagePool against a plain account of it: who holds what, which prefixes can be found, and what goes first."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from rollout.pages import PagePool, Path

Tokens = tuple[int, ...]
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple)


class Holder:
    """A sequence: its tokens, and its pages in order."""

    def __init__(self, tokens: Tokens, pages: list[int]) -> None:
        self.tokens, self.pages, self.path = tokens, pages, Path()


class Pool(RuleBasedStateMachine):
    holders = Bundle("holders")

    @initialize(pages=st.integers(1, 9), size=st.integers(1, 3), cache=st.sampled_from([True, True, False]))
    def start(self, pages: int, size: int, cache: bool) -> None:
        self.pool, self.size, self.cache = PagePool(pages, size, cache), size, cache
        self.live: list[Holder] = []
        self.found: dict[Tokens, int] = {}  # prefix -> page, where every shorter prefix is here too
        self.cached: dict[int, Tokens] = {}  # page -> the prefix that it ends, also where a parent is gone
        self.idle: list[int] = []  # cached and unowned, oldest first

    def owned(self) -> Counter[int]:
        return Counter(page for holder in self.live for page in holder.pages)

    def longest(self, tokens: Tokens) -> list[int]:
        pages: list[int] = []
        while (len(pages) + 1) * self.size < len(tokens):
            page = self.found.get(tokens[: (len(pages) + 1) * self.size])
            if page is None:
                break
            pages.append(page)
        return pages

    def evict(self, count: int) -> None:
        for page in self.idle[:count]:
            gone = self.cached.pop(page)
            if self.found.get(gone) == page:
                self.found = {p: owner for p, owner in self.found.items() if p[: len(gone)] != gone}
        self.idle = self.idle[count:]

    @rule(target=holders, tokens=TOKENS)
    def admit(self, tokens: Tokens):
        """What the scheduler does with a new sequence: match, then take the rest, or give back."""
        hits = self.pool.hit_tokens
        expected = self.longest(tokens)
        holder = Holder(tokens, [])
        matched = holder.pages = self.pool.match(tokens, holder.path)
        assert matched == expected
        assert self.pool.hit_tokens == hits + len(matched) * self.size
        assert len(matched) * self.size < len(tokens), "a token must be left to compute"
        for i, page in enumerate(matched):  # it really holds those tokens
            assert self.cached[page] == tokens[: (i + 1) * self.size]
        self.live.append(holder)
        self.idle = [page for page in self.idle if page not in matched]
        count = self.pool.needed(len(tokens)) - len(matched)
        free = self.pool.pages - len(self.owned()) - len(self.idle)
        assert self.pool.available == free + len(self.idle)
        before = self.owned()
        fresh = self.pool.take(count)
        if fresh is None:
            assert count > free + len(self.idle)
            self._drop(holder)
            return multiple()
        assert len(set(fresh)) == len(fresh) == count and not before.keys() & set(fresh)
        evicted = self.idle[: max(0, count - free)]
        assert set(evicted) <= set(fresh) and not set(fresh) & set(self.idle[len(evicted) :])
        self.evict(len(evicted))
        holder.pages = matched + fresh
        return holder

    @rule(holder=holders, part=st.floats(0, 1), remembered=st.booleans())
    def publish(self, holder: Holder, part: float, remembered: bool) -> None:
        if holder not in self.live:
            return
        tokens = holder.tokens[: round(part * len(holder.tokens))]
        self.pool.publish(tokens, holder.pages, holder.path if remembered else None)
        for i in range(len(tokens) // self.size if self.cache else 0):
            prefix, page = tokens[: (i + 1) * self.size], holder.pages[i]
            if prefix not in self.found:
                if page in self.cached:
                    break
                self.found[prefix], self.cached[page] = page, prefix

    @rule(holder=consumes(holders))
    def release(self, holder: Holder) -> None:
        if holder in self.live:
            self._drop(holder)

    def _drop(self, holder: Holder) -> None:
        self.pool.release(holder.pages)
        self.live.remove(holder)
        left = self.owned()
        self.idle += [page for page in reversed(holder.pages) if page in self.cached and not left[page]]

    @precondition(lambda self: len(self.cached) > 1)  # else most of the rules that are drawn are this one
    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.found, self.cached, self.idle = {}, {}, []

    @invariant()
    def every_page_is_somewhere_once(self) -> None:
        if not hasattr(self, "pool"):
            return
        owned, free, idle = self.owned(), self.pool._free, list(self.pool._idle)
        assert sorted([*free, *idle, *owned]) == list(range(self.pool.pages))
        assert [owned[page] for page in range(self.pool.pages)] == self.pool._references
        assert idle == self.idle
        assert set(self.pool._node_of) == set(self.cached)
        assert len(self.pool._nodes) == len(self.cached)


Pool.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestPool = Pool.TestCase


def test_pages_of_a_length() -> None:
    pool = PagePool(4, 3)
    assert [pool.needed(n) for n in (0, 1, 3, 4, 6, 7)] == [0, 1, 1, 2, 2, 3]


def test_a_prefix_outlives_what_follows_it() -> None:
    pool = PagePool(3, 2)
    pages = pool.take(3)
    assert pages is not None
    pool.publish((1, 2, 3, 4, 5, 6), pages)
    pool.release(pages)
    assert pool.take(1) == [pages[2]]  # the end goes first
    assert pool.match((1, 2, 3, 4, 5, 6)) == pages[:2]
    assert pool.take(1) is None


def test_nothing_is_taken_where_not_all_can_be() -> None:
    pool = PagePool(3, 1)
    assert pool.take(4) is None and pool.available == 3
    assert pool.take(0) == []
    assert sorted(pool.take(3) or []) == [0, 1, 2]


@pytest.mark.parametrize("path", [None, Path()], ids=["", "remembered"])
def test_a_chain_whose_start_was_evicted_is_not_found_nor_lost(path: Path | None) -> None:
    """Two sequences compute one prefix side by side; the first one's pages leave, the second publishes below them."""
    pool = PagePool(4, 1)
    first, second = pool.take(1), pool.take(3)
    assert first and second
    pool.publish((7,), first)
    pool.publish((7, 8), second, path)  # 7 is known: page second[0] stays private, 8 hangs below first[0]
    pool.release(first)
    assert pool.take(1) == first  # evicts 7, so 8 has no parent
    assert pool.match((7, 8, 9)) == []
    pool.publish((7, 8, 9), second, path)
    assert pool.match((7, 8, 9, 0)) == second[:1]
    pool.release(second[:1])
    pool.release(second)
    pool.release(first)
    assert pool.available == 4 and len(pool.take(4) or []) == 4
