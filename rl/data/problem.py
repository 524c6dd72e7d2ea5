"""Defines a problem, a source of problems, and the order in which a run takes them."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.data.draws import Draws
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
class Source:
    """Brings problems for training, problems that training never sees, and what judges both."""

    train: Sequence[Problem]
    held_out: Sequence[Problem]
    judge: Judge
    tokenizer: Tokenizer
    left_out: int = 0  # problems of neither, because their prompts are too long
    verifier: str = "the data's verifier"  # what `judge` is called
    warnings: tuple[str, ...] = ()  # one line each
    rows_sha256: str = ""  # of all fields of the rows that the problems were made of
    about: tuple[str, ...] = ()  # what was found out of the data that the user did not say, one line each

    def encode_solution(self, problem: Problem) -> tuple[int, ...]:
        """Encodes the solution as a completion, with its end."""
        return self.tokenizer.completion(problem.solution)


class ProblemStream:
    """Goes in epochs over the problems, each in its own order. A pure function of (seed, name, cursor): the cursor is all
    there is to save."""

    def __init__(self, problems: Sequence[Problem], seed: int, name: int) -> None:
        self._problems, self._key, self.cursor = problems, (seed, name), 0
        self._epoch = -1
        self._order: list[int] = []

    def take(self, count: int) -> list[Problem]:
        """Returns the next `count` problems; each pass over all of them has its own drawn order."""
        out = []
        for _ in range(count):
            epoch, at = divmod(self.cursor, len(self._problems))
            if epoch != self._epoch:
                seed, name = self._key
                self._epoch, self._order = epoch, Draws(seed, name << 32 | epoch).permutation(len(self._problems))
            out.append(self._problems[self._order[at]])
            self.cursor += 1
        return out
