"""Drafts for the sequences of a step, and counts what came of it."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Protocol

from rollout.drafts.acceptance import Acceptance
from rollout.drafts.drafter import Draft, Drafter
from rollout.sequence import Sequence, Span


class Paced(Protocol):
    """Declares what decides how much is drafted (`rollout.drafts.pace.Pace`); ranks must decide alike."""

    reach: int

    def wants(self, running: int) -> bool:
        """Says whether the next step of so many sequences is to be drafted for; asked once a step."""

    def lengths(self, running: int, chances: Many[tuple[float, int]], room: int) -> Many[int]:
        """Returns how many drafted tokens of each sequence to check."""

    def record(self, drafted: bool, running: int, rows: int, seconds: float) -> None:
        """Takes the seconds of a step of so many sequences and rows."""

    def plain(self, running: int) -> float | None:
        """Returns the seconds of a step of so many sequences without drafts; None: not known."""


@dataclass
class Counts:
    """Counts since the engine began. A step is one with drafts, a draw a sequence of such a step."""

    drafted: int = 0  # tokens that were checked
    accepted: int = 0  # of these, the ones that were right and taken
    steps: int = 0
    draws: int = 0
    tokens: int = 0  # that these steps brought
    seconds_saved: float = 0.0  # against steps without drafts that bring as many tokens; estimated
    accepted_of: dict[str, int] = field(default_factory=dict)  # by the draft's source

    def plus(self, other: "Counts") -> "Counts":
        """Returns the sums of both."""
        sources = {**self.accepted_of, **other.accepted_of}
        return Counts(
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            self.steps + other.steps,
            self.draws + other.draws,
            self.tokens + other.tokens,
            self.seconds_saved + other.seconds_saved,
            {s: self.accepted_of.get(s, 0) + other.accepted_of.get(s, 0) for s in sources},
        )


@dataclass(frozen=True)
class Step:
    """Describes a step whose results were taken."""

    decodes: bool  # and does nothing else
    guesses: int
    rows: int
    gained: Many[tuple[Sequence, int]]  # the sequences that sampled, and how many tokens each got
    captured: bool = False  # a graph was captured meanwhile, so its time says nothing


@dataclass(frozen=True)
class _Open:
    """A draft whose tokens are not all known to be right or wrong."""

    draft: Draft
    place: int  # of its first token


class Speculation:
    """Asks drafters for tokens, lets a pace say how many of them are checked, and measures both. A draft is scored against what
    its sequence says afterwards, whether it was checked or not, so that trying one costs no row."""

    def __init__(
        self, drafters: Many[Drafter], pace: Paced, vocab: int, overlap: bool, clock: Callable[[], float] | None = None
    ) -> None:
        """`overlap`: steps without drafts overlap with their planning, so that one alone takes longer."""
        self.drafters, self.pace, self.vocab, self.counts = list(drafters), pace, vocab, Counts()
        self._acceptance = Acceptance()
        self._open: dict[Sequence, _Open] = {}
        self._clock = clock or time.perf_counter
        self._since: float | None = None  # when the results of the step before were taken; None: nothing ran then
        self._settled = (
            1 if overlap else 0
        )  # steps without drafts in a row, of which the time is not that of overlapped ones
        self._row = 0  # steps without drafts so far in a row

    def wants(self, running: int) -> bool:
        """Says whether the next step of so many sequences is to be drafted for; if so, nothing may be pending then."""
        return self.pace.wants(running)

    def guess(self, spans: Many[Span], room: int) -> list[Many[int]]:
        """Returns the tokens to check after each span; `room`: rows for them."""
        self._row = 0
        sequences = [span.sequence for span in spans]
        for sequence in [s for s in self._open if s.ended]:
            self._score(sequence)
        for sequence in sequences:
            self._score(sequence)
        drafts = self._best(sequences)
        for sequence, draft in zip(sequences, drafts, strict=True):
            if draft.tokens:
                self._open[sequence] = _Open(draft, len(sequence.tokens))
        chances = [(self._acceptance.chance((d.source, d.grade)), len(d.tokens)) for d in drafts]
        lengths = self.pace.lengths(len(spans), chances, room)
        return [draft.tokens[:length] for draft, length in zip(drafts, lengths, strict=True)]

    def _best(self, sequences: Many[Sequence]) -> list[Draft]:
        """Of the drafts for a sequence the one that is likeliest right; an empty one where there is none."""
        best = [Draft((), "")] * len(sequences)
        for drafter in self.drafters:
            for i, draft in enumerate(drafter.draft(sequences, self.pace.reach)):
                cut = self._cut(draft, sequences[i]) if draft else best[i]
                if cut.tokens and (not best[i].tokens or self._chance(cut) > self._chance(best[i])):
                    best[i] = cut
        return best

    def _chance(self, draft: Draft) -> float:
        return self._acceptance.chance((draft.source, draft.grade))

    def _cut(self, draft: Draft, sequence: Sequence) -> Draft:
        """Without what cannot be checked: more than may follow, and all from the first id on that the model does not have."""
        tokens = draft.tokens[: max(0, sequence.most - len(sequence.tokens) - 1)]
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab:
            tokens = tuple(takewhile(lambda t: 0 <= t < self.vocab, tokens))
        elif len(tokens) == len(draft.tokens):
            return draft
        return Draft(tokens, draft.source, draft.grade)

    def _score(self, sequence: Sequence) -> None:
        opened = self._open.pop(sequence, None)
        if opened:
            draft, said = opened.draft, sequence.tokens[opened.place : opened.place + len(opened.draft.tokens)]
            self._acceptance.score((draft.source, draft.grade), draft.tokens, said)

    def taken(self, step: Step) -> None:
        """Hears of a step whose results were taken."""
        now, running, count = self._clock(), len(step.gained), sum(count for _, count in step.gained)
        seconds, self._since = None if self._since is None else now - self._since, now
        self._row = 0 if step.guesses else self._row + 1
        timed = step.decodes and not step.captured and (step.guesses > 0 or self._row > self._settled)
        if step.guesses:
            self._count(step, running, count, seconds or 0.0)
        if timed and seconds is not None and running:
            self.pace.record(step.guesses > 0, running, step.rows, seconds)
        for sequence, _ in step.gained:
            if sequence.ended:
                for drafter in self.drafters:
                    drafter.ended(sequence)

    def paused(self) -> None:
        """Hears that the engine has nothing to do, or something else: the time until the next step is not that of a step."""
        self._since = None

    def _count(self, step: Step, running: int, count: int, seconds: float) -> None:
        counts = self.counts
        counts.drafted += step.guesses
        counts.accepted += count - running
        counts.steps, counts.draws, counts.tokens = counts.steps + 1, counts.draws + running, counts.tokens + count
        for sequence, gained in step.gained:
            if gained > 1 and sequence in self._open:
                source = self._open[sequence].draft.source
                counts.accepted_of[source] = counts.accepted_of.get(source, 0) + gained - 1
        if plain := self.pace.plain(running):
            counts.seconds_saved += plain * count / max(running, 1) - seconds
