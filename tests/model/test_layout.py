"""Layouts against the plain words: token t of sequence s stands at position p, its key in row r."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.model import Layout, PagedCache
from kernels.model.layout import attend
from kernels.ops import store_rows
from kernels.ops.attention import Pages
from tests.bits import assert_same_bits

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)


def row(layout: Layout, sequence: int, position: int) -> int:
    """The key-value row of a position, as the docstring of Pages has it."""
    size = layout.pages.size
    return int(layout.pages.table[sequence, position // size]) * size + position % size


def check(layout: Layout, tokens: list[tuple[int, int]], sequences: int) -> None:
    """`tokens`: (sequence, position) of every token, in order."""
    pages = layout.pages
    assert list(zip(pages.sequence.tolist(), pages.position.tolist(), strict=True)) == tokens
    assert layout.positions is pages.position
    assert [t.dtype for t in (pages.table, pages.sequence, pages.position)] == [torch.int32] * 3
    assert [t.dtype for t in (pages.starts, layout.slots, layout.groups)] == [torch.int64] * 3
    starts = [sum(s < i for s, _ in tokens) for i in range(sequences + 1)]
    assert pages.starts.tolist() == starts
    assert layout.slots.tolist() == [row(layout, s, p) for s, p in tokens]
    assert len(set(layout.slots.tolist())) == len(tokens), "two tokens write one row"


@PROPERTY
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5))
def test_packed(groups: list[list[int]]) -> None:
    lengths = [n for group in groups for n in group]
    layout = Layout.packed(lengths, [len(group) for group in groups])
    check(layout, [(s, p) for s, n in enumerate(lengths) for p in range(n)], len(lengths))
    assert layout.pages.size == 1
    assert layout.slots.tolist() == list(range(sum(lengths)))  # the keys are the activations themselves
    assert layout.groups.tolist() == [sum(map(sum, groups[:i])) for i in range(len(groups) + 1)]
    assert int(layout.pages.table.min()) >= 0 and int(layout.pages.table.max()) < sum(lengths)  # no row out of reach


@st.composite
def paged(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[list[int]], int]:
    size = draw(st.integers(1, 5))
    spans = [
        (start, start + draw(st.integers(1, 7))) for start in draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
    ]
    free = draw(st.permutations(range(90)))
    tables = []
    for _, stop in spans:
        owned = -(-stop // size) + draw(st.integers(0, 1))
        tables.append(list(free[:owned]))
        free = free[owned:]
    return spans, tables, size


@PROPERTY
@given(paged())
def test_paged(case: tuple[list[tuple[int, int]], list[list[int]], int]) -> None:
    spans, tables, size = case
    layout = Layout.paged(spans, tables, size)
    check(layout, [(s, p) for s, (a, b) in enumerate(spans) for p in range(a, b)], len(spans))
    assert layout.pages.size == size
    for s, owned in enumerate(tables):
        assert layout.pages.table[s, : len(owned)].tolist() == owned
    assert layout.groups.tolist() == [0, sum(b - a for a, b in spans)]
    tokens, parts = [p for a, b in spans for p in range(a, b)], []
    for part, pages in layout.parts:
        parts += tokens[part]
        assert pages.position.tolist() == tokens[part]
        check_kind(layout, part, pages)
    assert parts == tokens, "every token is in one part"
    rows = torch.arange(len(tokens))[:: len(tokens) // 3 + 1]
    ends = layout.ends(rows)
    assert ends.pages.starts.tolist() == list(range(len(rows) + 1)), "each is for itself"
    assert ends.pages.table is layout.pages.table and ends.pages.size == size
    assert torch.equal(ends.pages.sequence, layout.pages.sequence[rows])
    assert torch.equal(ends.positions, layout.positions[rows]) and torch.equal(ends.slots, layout.slots[rows])


def check_kind(layout: Layout, part: slice, pages: Pages) -> None:
    """A part says the same of its tokens as the whole; only beginnings read their own activations."""
    lengths = pages.starts.diff().tolist()
    if pages.packed:
        assert pages.position.tolist() == [p for n in lengths for p in range(n)] and min(lengths) > 1
        return
    assert set(lengths) == {1} or min(lengths) > 1
    theirs = layout.pages.table[layout.pages.sequence[part].long()]
    assert torch.equal(pages.table[pages.sequence.long()], theirs)
    assert pages.sequence.tolist() == [s for s, n in enumerate(lengths) for _ in range(n)]


def calls_of(k: torch.Tensor, held: tuple[torch.Tensor, torch.Tensor], layout: Layout) -> list:
    """What attention is called with by keys k and values -k."""
    calls = []

    def attention(
        q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: Pages, scale: float
    ) -> torch.Tensor:
        calls.append((keys, values, pages))
        return q

    assert torch.equal(attend(attention, k, (k, -k), held, layout, 1.0), k)
    return calls


def test_without_parts_there_is_one_call() -> None:
    k, layout = torch.randn(5, 2, 16), Layout.packed([2, 3], [2])
    ((keys, values, pages),) = calls_of(k, (k, -k), layout)
    assert keys is k and torch.equal(values, -k) and pages is layout.pages


def test_the_cache_keeps_what_was_written_and_is_nan_elsewhere() -> None:
    cache = PagedCache(*(torch.full((2, 4 * 3, 1, 2), torch.nan) for _ in range(2)))
    tables = [[3, 0], [2]]
    first = Layout.paged([(0, 4), (0, 2)], tables, 3)
    second = Layout.paged([(4, 5), (2, 3)], tables, 3)
    k = torch.arange(16, dtype=torch.float32).view(8, 1, 2)
    store_rows(*cache.rows(1), first.slots, k[:6], -k[:6])
    ((own, _, pages),) = calls_of(k[:6], cache.rows(1), first)
    assert pages.packed and torch.equal(own, k[:6]), "a beginning attends to itself"
    store_rows(*cache.rows(1), second.slots, k[6:], -k[6:])
    ((keys, values, _),) = calls_of(k[6:], cache.rows(1), second)
    rows = [9, 10, 11, 0, 6, 7, 1, 8]  # of the tokens, in order of writing
    assert_same_bits(keys[rows], k)
    assert_same_bits(values[rows], -k)
    untouched = [r for r in range(12) if r not in rows]
    assert keys[untouched].isnan().all() and values[untouched].isnan().all()
    assert cache.keys[0].isnan().all() and cache.values[0].isnan().all()
