"""Defines a problem, a source of problems, and the order in which a run takes them."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl.data.draws import Draws

if TYPE_CHECKING:  # a process that judges needs problems, and no torch
    from rollout.tokenizer import Tokenizer


@dataclass(frozen=True)
class Problem:
    """Holds a prompt, its answer, and what a supervised step teaches for it."""

    id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    answer: str  # the result that a completion is judged by; "" where the source knows none, but judges
    solution: str  # what a supervised step teaches; ends in the result
    record: Any  # the source's own record, for its verifier: of a data set the row, with every field
    messages: Sequence[Mapping[str, Any]] | None = None  # that the prompt was written from; None: it was a text


TRAIN, WARMUP = 0, 1
"""Names of the streams of a run's problems."""


def is_held_out(text: str) -> bool:
    """Tells whether a problem is never trained on: one in eight, by the checksum of its text."""
    return zlib.crc32(text.encode()) % 8 == 0


Judge = Callable[[Problem, str], float]
"""(problem, completion text) -> reward; 1.0 is a correct answer."""


@dataclass(frozen=True)
class Share:
    """Says how many problems a source of a mixture has, and how many of the `sum(weights)` next ones are of it."""

    problems: int
    weight: int


@dataclass(frozen=True)
class Source:
    """Brings problems for training, problems that training never sees, and what judges both."""

    train: Sequence[Problem]
    held_out: Sequence[Problem]
    judge: Judge
    tokenizer: "Tokenizer"
    left_out: int = 0  # problems of neither, because their prompts are too long
    verifier: str = "the data's verifier"  # what `judge` is called
    warnings: tuple[str, ...] = ()  # one line each
    rows_sha256: str = ""  # of all fields of the rows that the problems were made of
    about: tuple[str, ...] = ()  # what was found out of the data that the user did not say, one line each

    shares: tuple[Share, ...] = ()  # of a mixture, in the order of `train`
    ranks: tuple[float, ...] = ()  # of the problems of `train`: the least come first

    def stream(self, seed: int, name: int) -> "ProblemStream":
        """Returns the order in which a run takes the problems that it trains on."""
        return ProblemStream(self.train, seed, name, self.shares, self.ranks)

    def encode_solution(self, problem: Problem) -> tuple[int, ...]:
        """Encodes the solution as a completion, with its end."""
        return self.tokenizer.completion(problem.solution)


class ProblemStream:
    """Goes in epochs over the problems, each in its own order. A pure function of (seed, name, cursor): the cursor is all
    there is to save.

    Of a mixture, each problem is of a source that is drawn: in every `sum(weights)` problems each source has exactly as many
    as its weight says, and goes over its own problems in epochs of its own. In the first epoch of a source problems go by
    their rank, the least first; what has the same rank is drawn.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        seed: int,
        name: int,
        shares: Sequence[Share] = (),
        ranks: Sequence[float] = (),
    ) -> None:
        """`problems`: those of the first source, then of the next, each as many as its share says; () is one source. `ranks`:
        one a problem, or ()."""
        self._problems, self.cursor = problems, 0
        shares = shares or (Share(len(problems), 1),)
        self._weights = [share.weight for share in shares]
        self._slots = [i for i, weight in enumerate(self._weights) for _ in range(weight)]
        self._slot_order = _Order(seed, name, len(self._slots)) if len(shares) > 1 else None
        self._orders, self._starts, start = [], [], 0
        for i, share in enumerate(shares):
            # Names are small numbers, and a source's own are far from them
            own = name if len(shares) == 1 else name | (i + 1) << 8
            self._orders.append(_Order(seed, own, share.problems, ranks[start : start + share.problems]))
            self._starts.append(start)
            start += share.problems

    def take(self, count: int) -> list[Problem]:
        """Returns the next `count` problems; each pass over all of a source has its own drawn order."""
        out = []
        for _ in range(count):
            source, at = self._place()
            order = self._orders[source]
            epoch, i = divmod(at, len(order))
            out.append(self._problems[self._starts[source] + order.of(epoch)[i]])
            self.cursor += 1
        return out

    def _place(self) -> tuple[int, int]:
        """Returns the source of the next problem, and how many of it came before."""
        if self._slot_order is None:
            return 0, self.cursor
        block, i = divmod(self.cursor, len(self._slots))
        sources = [self._slots[slot] for slot in self._slot_order.of(block)[: i + 1]]
        return sources[i], block * self._weights[sources[i]] + sources[:i].count(sources[i])


class _Order:
    """Draws the order of `size` things, for one epoch after another."""

    def __init__(self, seed: int, name: int, size: int, ranks: Sequence[float] = ()) -> None:
        self._key, self._size, self._ranks = (seed, name), size, ranks
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return self._size

    def of(self, epoch: int) -> list[int]:
        """Returns 0 .. size - 1 in the order of that epoch."""
        if epoch != self._epoch:
            seed, name = self._key
            self._epoch, self._order = epoch, Draws(seed, name << 32 | epoch).permutation(self._size)
            if epoch == 0 and self._ranks:
                self._order.sort(key=self._ranks.__getitem__)
        return self._order
