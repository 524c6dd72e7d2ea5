"""The reduction tree: the one definition of the order in which partial sums are added.

A sum is cut into leaves. A leaf is one chain, in ascending order, from zero. Leaves are nodes of a balanced binary tree:

    root = ((n0 + n1) + (n2 + n3)) + ((n4 + n5) + (n6 + n7))

A shard holds consecutive leaves that are a whole subtree, so "who computed which leaf" is not part of the result. Where
the number of leaves is no power of two, the tree is that of the next power of two with the missing leaves left out:
`fold` of 6 is ((n0 + n1) + (n2 + n3)) + (n4 + n5).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Node = TypeVar("Node")

KEY_BLOCK = 128
"""Keys in one block of attention; blocks start at position 0."""
KEY_SPLIT = 512
"""Keys in one split of attention: blocks inside a split are one online softmax, splits merge in ascending order."""


class TreeError(ValueError):
    """Says that an extent, a leaf count and a shard do not fit together; the message names the numbers."""


def is_power_of_two(n: int) -> bool:
    """Says whether n is 1, 2, 4, ..."""
    return n > 0 and n & (n - 1) == 0


@dataclass(frozen=True)
class Shard:
    """Names part `rank` of `size` equal consecutive parts of a tensor-parallel extent."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not is_power_of_two(self.size) or not 0 <= self.rank < self.size:
            raise TreeError(f"shard {self.rank} of {self.size}: the size must be a power of two and the rank below it")

    def part(self, extent: int, what: str = "extent") -> int:
        """Returns extent / size, or an error that names both."""
        if extent % self.size:
            raise TreeError(f"{what} {extent} is not divisible by tensor-parallel size {self.size}")
        return extent // self.size

    def range(self, extent: int, what: str = "extent") -> slice:
        """Returns the slice of `extent` that this shard holds; an error names `what` where it cannot be cut evenly."""
        n = self.part(extent, what)
        return slice(self.rank * n, (self.rank + 1) * n)


WHOLE = Shard()


def leaf_bounds(extent: int, leaves: int, what: str = "extent") -> list[int]:
    """Returns offsets [leaves + 1] of `leaves` equal parts of `extent`; `leaves` must be a power of two that divides it."""
    if not is_power_of_two(leaves):
        raise TreeError(f"{leaves} leaves: the number of leaves must be a power of two")
    if extent % leaves:
        raise TreeError(f"{what} {extent} is not divisible by {leaves} leaves: lower model.leaves to a divisor")
    return list(range(0, extent + 1, extent // leaves))


def fold(nodes: Sequence[Node], add: Callable[[Node, Node], Node]) -> Node:
    """Returns the root of the tree over `nodes`, as the definition reads: split at the largest power of two below the count."""
    if len(nodes) == 1:
        return nodes[0]
    half = 1 << (len(nodes) - 1).bit_length() - 1
    return add(fold(nodes[:half], add), fold(nodes[half:], add))


class Counter(Generic[Node]):
    """Folds nodes that arrive one at a time: a binary counter that keeps at most log2(n) + 1 of them.

    Used where the nodes are large (gradients of micro-batches). `push` in ascending leaf order, then `root` once. A node may
    be the root of 2^level leaves that begin at a multiple of 2^level: how the leaves are cut into nodes changes no bit.
    """

    def __init__(self, add: Callable[[Node, Node], Node]) -> None:
        self._add = add
        self._parked: list[tuple[int, Node]] = []  # (level, node), levels falling
        self._count = 0  # leaves

    def push(self, node: Node, level: int = 0) -> None:
        """Takes the next node, of 2^level leaves, and merges it as far as it goes; TreeError where it is not aligned."""
        if self._count % (1 << level):
            raise TreeError(
                f"a node of {1 << level} leaves cannot follow {self._count} leaves: it would not be aligned"
            )
        self._count += 1 << level
        while self._parked and self._parked[-1][0] == level:
            node = self._add(self._parked.pop()[1], node)
            level += 1
        self._parked.append((level, node))

    def root(self) -> Node:
        """Returns the sum of all nodes so far and begins anew; TreeError where there are none."""
        if not self._parked:
            raise TreeError("an empty sum has no root")
        nodes = [node for _, node in self._parked]
        self._parked, self._count = [], 0
        root = nodes.pop()
        while nodes:
            root = self._add(nodes.pop(), root)
        return root
