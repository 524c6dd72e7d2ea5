"""The tree itself, with nodes that are strings: the parentheses are the order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.tree import WHOLE, Counter, Shard, TreeError, fold, is_power_of_two, leaf_bounds

_ORDER = {
    1: "0",
    2: "(0+1)",
    3: "((0+1)+2)",
    4: "((0+1)+(2+3))",
    5: "(((0+1)+(2+3))+4)",
    6: "(((0+1)+(2+3))+(4+5))",
    7: "(((0+1)+(2+3))+((4+5)+6))",
    8: "(((0+1)+(2+3))+((4+5)+(6+7)))",
    9: "((((0+1)+(2+3))+((4+5)+(6+7)))+8)",
}


def add(a: str, b: str) -> str:
    return f"({a}+{b})"


def symbols(count: int, first: int = 0) -> list[str]:
    return [str(i) for i in range(first, first + count)]


def counted(nodes: list[str]) -> str:
    counter = Counter(add)
    for node in nodes:
        counter.push(node)
    return counter.root()


@pytest.mark.parametrize("count", _ORDER)
def test_fold_has_the_parentheses_of_the_definition(count: int) -> None:
    assert fold(symbols(count), add) == _ORDER[count]


@pytest.mark.parametrize("count", range(1, 71))
def test_the_counter_is_the_fold(count: int) -> None:
    assert counted(symbols(count)) == fold(symbols(count), add)


@pytest.mark.parametrize("count", [1, 2, 8, 13, 64])
@pytest.mark.parametrize("part", [1, 2, 4, 8])
def test_aligned_parts_are_subtrees(count: int, part: int) -> None:
    parts = [fold(symbols(min(part, count - i), i), add) for i in range(0, count, part)]
    assert fold(parts, add) == fold(symbols(count), add)


def test_parts_that_are_not_aligned_are_not() -> None:
    assert fold([fold(symbols(3), add), fold(symbols(3, 3), add)], add) != fold(symbols(6), add)


def test_a_counter_keeps_few_nodes_and_starts_again_after_its_root() -> None:
    counter = Counter(add)
    for i in range(1000):
        counter.push(str(i))
        assert len(counter._parked) <= 10
    counter.root()
    counter.push("a")
    counter.push("b")
    assert counter.root() == "(a+b)"
    counter.push("a")
    counter.root()
    counter.push("ab", level=1)  # aligned again
    assert counter.root() == "ab"


def test_a_counter_adds_each_pair_as_soon_as_it_can() -> None:
    """Memory is the point of it: a node must not wait for more than the other half of its pair."""
    done: list[str] = []

    def note(a: str, b: str) -> str:
        done.append(add(a, b))
        return done[-1]

    counter = Counter(note)
    for i in range(4):
        counter.push(str(i))
    assert done == ["(0+1)", "(2+3)", "((0+1)+(2+3))"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.data())
def test_nodes_of_any_level_end_in_the_same_root(leaves: int, data: st.DataObject) -> None:
    counter, first = Counter(add), 0
    while first < leaves:
        fitting = [k for k in range(7) if first % (1 << k) == 0 and first + (1 << k) <= leaves]
        level = data.draw(st.sampled_from(fitting))
        counter.push(fold([str(i) for i in range(first, first + (1 << level))], add), level)
        first += 1 << level
    assert counter.root() == fold([str(i) for i in range(leaves)], add)


def test_a_node_that_is_not_aligned_is_refused() -> None:
    counter = Counter(add)
    counter.push("0")
    with pytest.raises(TreeError, match="a node of 2 leaves cannot follow 1 leaves"):
        counter.push("1-2", level=1)


def test_an_empty_sum_has_no_root() -> None:
    with pytest.raises(TreeError, match="empty"):
        Counter(add).root()


def test_leaf_bounds() -> None:
    assert leaf_bounds(12, 4) == [0, 3, 6, 9, 12]
    assert leaf_bounds(5, 1) == [0, 5]
    assert leaf_bounds(8, 8) == list(range(9))


@pytest.mark.parametrize("leaves", [0, -2, 3, 6, 12])
def test_leaves_are_a_power_of_two(leaves: int) -> None:
    with pytest.raises(TreeError, match=f"{leaves} leaves"):
        leaf_bounds(24, leaves)


@pytest.mark.parametrize(("extent", "leaves"), [(10, 4), (4, 8), (7, 2)])
def test_leaves_divide_the_extent(extent: int, leaves: int) -> None:
    with pytest.raises(TreeError, match=f"width {extent} .* {leaves} leaves"):
        leaf_bounds(extent, leaves, "width")


@pytest.mark.parametrize(("rank", "size"), [(0, 0), (0, 3), (2, 2), (-1, 2), (0, -1), (8, 8)])
def test_impossible_shards(rank: int, size: int) -> None:
    with pytest.raises(TreeError, match=f"shard {rank} of {size}"):
        Shard(rank, size)


def test_shards_tile_an_extent() -> None:
    for size in (1, 2, 4, 8):
        parts = [Shard(rank, size).range(24) for rank in range(size)]
        assert [i for part in parts for i in range(24)[part]] == list(range(24))
        assert {Shard(rank, size).part(24) for rank in range(size)} == {24 // size}
    assert WHOLE.range(7) == slice(0, 7)
    with pytest.raises(TreeError, match=r"heads 6 .* 4"):
        Shard(1, 4).range(6, "heads")


def test_powers_of_two() -> None:
    assert [n for n in range(-4, 70) if is_power_of_two(n)] == [1, 2, 4, 8, 16, 32, 64]
