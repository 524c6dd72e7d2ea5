"""Carries samples that are not done over to the next step, where newer weights go on with them: `rollout.carry`.

In a round every sample under way draws at most `rollout.carry` tokens, and then it waits. A round begins with as many further
problems as a step has; a step takes rounds until as many groups are done as it trains on, the oldest first, and leaves the rest
to the next one. A group is done, judged and worth something as a whole.

What is carried is decided by the tokens of each sample alone. These depend on its seed and on the weights that drew them, and
so on no clock, batch, engine or layout. (Which samples are the fastest in the midst of a round depends on all of these.) A
sample goes on as a request for what follows all its tokens so far: new weights compute their keys again, a round under the same
weights finds them in the cache.

So a token drawn in step s has the log-prob of the weights of step s over its whole prefix, whoever drew that, and is proven
so: what each step drew, with all that stands before it, is a batch of its own for the trainer's weights of that step (`lag.py`
asks for it, every `align.every`-th step). The ratio of the loss has the sampler's own log-prob in its denominator, exact.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import numpy as np

from rl.algorithms.advantages import has_signal
from rl.clock import Clock
from rl.config import RunConfig
from rl.data import Problem
from rl.dynamic_sampling import Drawn
from rl.environments.environment import score
from rl.errors import UserError
from rl.journal import Compared
from rl.samples import Group, Transcript
from rl.step import Step
from rollout.sampling import Completion, Request
from trainer.batch import COLUMNS, Batch

FILE = "carried.pickle"
"""Name of the file of a checkpoint that holds what was carried over it."""


@dataclass(frozen=True)
class Unfinished:
    """Holds the samples of a problem while they are under way."""

    number: int  # of the problems of the run, in the order in which they began
    problem: Problem
    first: tuple[Request, ...]  # what each sample was asked with when it began
    drawn: tuple[Completion | None, ...]  # what each has so far
    before: tuple[int, ...]  # tokens that each had when the step began


@dataclass(frozen=True)
class Part:
    """Holds what one sample drew in one step, after all tokens that stood there."""

    given: tuple[int, ...]
    before: int  # of these tokens, the ones that it drew in earlier steps
    completion: Completion


@dataclass(frozen=True)
class Taken(Drawn):
    """Holds the groups of a step, and what was drawn in it, which is more and less than these."""

    parts: tuple[Part, ...]
    gone: tuple[int, ...]  # seeds of the samples that no step trains on
    carried: int  # samples under way after it
    waiting: int  # groups that are done and left to the next step
    sequences: int  # of an update

    def metrics(self) -> dict[str, int]:
        """Names the counts as a log does."""
        tokens = sum(len(part.completion.token_ids) for part in self.parts)
        counts = {"carried": self.carried, "groups_waiting": self.waiting, "tokens_drawn": tokens}
        return super().metrics() | {f"sampling/{name}": count for name, count in counts.items()}

    def transcripts(self) -> list[Transcript]:
        """Returns what was drawn in the step, each part after what it was given, filled up with prompts of which nothing is
        asked to a batch of the trainer's."""
        if not self.parts:
            return []
        shortest = min((part.given for part in self.parts), key=len)
        rest = -len(self.parts) % self.sequences
        return [(part.given, part.completion) for part in self.parts] + [(shortest,)] * rest


@dataclass
class Pool:
    """Holds what one step leaves to the next. It is plain data: a checkpoint has it."""

    started: int = 0  # problems
    under_way: list[Unfinished] = field(default_factory=list)
    done: list[tuple[int, Group]] = field(default_factory=list)  # by the number of its problem
    proven: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)
    """The trainer's log-probs of samples that no step has trained on yet: by seed, by the first of the tokens."""


def check_carry(config: RunConfig) -> None:
    """Raises UserError where a sample cannot be carried."""
    carry = config.rollout.carry
    if carry and config.environment.name != "single_turn":
        raise UserError(
            f"rollout.carry={carry} with environment.name={config.environment.name}: a conversation that waits has objects in "
            f"processes, which no checkpoint holds; set rollout.carry=0"
        )


class Carrying:
    """Draws the steps of a run by the parts of a `Step`, `tokens` of each sample a round."""

    def __init__(self, step: Step, tokens: int, pool: Pool | None = None) -> None:
        """`pool`: what a checkpoint holds."""
        self._step, self._tokens, self.pool = step, tokens, pool or Pool()

    def drawn(self, step: int, clock: Clock) -> Taken:
        """Draws until as many groups are done as step `step` trains on, and takes these."""
        with clock("handover", of="both"):
            self._step.cards.to_rollout()
        pool, wanted = self.pool, self._step.prompts
        pool.under_way = [_waited(under) for under in pool.under_way]
        done: list[Unfinished] = []
        rounds = spare = 0  # spare: rounds after that in which there were enough
        while not self._enough(spare):
            problems = self._step.stream.take(wanted)
            pool.under_way += self._begin(problems, step, rounds * wanted)
            done += self._round(clock)
            rounds, spare = rounds + 1, spare + (len(pool.done) >= wanted)
        parts = tuple(
            part for under in sorted([*done, *pool.under_way], key=attrgetter("number")) for part in _parts(under)
        )
        return self._take(parts, rounds)

    def compared(self, drawn: Taken, logprobs: np.ndarray | None, batch: Batch) -> Compared | None:
        """Returns those rows of a step's batch that were compared, with what the trainer said of each when it was drawn; None
        where there are none. `logprobs`: what the trainer says of that which was drawn in the step; None: it was not asked."""
        proven = self.pool.proven
        if logprobs is not None:
            ends = np.cumsum([len(part.completion.token_ids) for part in drawn.parts])
            for part, values in zip(drawn.parts, np.split(logprobs, ends[:-1]), strict=True):
                proven.setdefault(_seed(part.completion), {})[part.before] = values
        sampled = [c for group in drawn.groups for sample in group.samples for c in sample.completions]
        said = [_joined(proven.pop(_seed(c), {}), len(c.token_ids)) for c in sampled]
        for seed in drawn.gone:
            proven.pop(seed, None)
        known, values, places = (np.concatenate(column) for column in zip(*said, strict=True))
        if not known.any():
            return None
        columns = {name: getattr(batch, name)[known] for name in COLUMNS}
        some = Batch(batch.token_ids, batch.lengths, batch.rows[known], **columns)
        return Compared(some, values[known], places[known])

    def _enough(self, spare: int) -> bool:
        """Tells whether a step has its groups: done, and worth training on as far as its rounds reach."""
        step, done = self._step, self.pool.done
        teaching = len(done) if step.rounds == 1 else sum(has_signal(group) for _, group in done)
        return teaching >= step.prompts or (len(done) >= step.prompts and spare >= step.rounds)

    def _begin(self, problems: Sequence[Problem], step: int, first: int) -> Iterator[Unfinished]:
        requests = self._step.requests_for(problems, step, first)
        size = len(requests) // len(problems)
        for i, problem in enumerate(problems):
            mine = tuple(requests[i * size : (i + 1) * size])
            yield Unfinished(self.pool.started, problem, mine, (None,) * size, (0,) * size)
            self.pool.started += 1

    def _round(self, clock: Clock) -> list[Unfinished]:
        """Draws on with every sample under way; returns, judged and put aside, what is done then."""
        pool = self.pool
        asked = [request for under in pool.under_way for request in self._requests(under)]
        with clock("sample", of="sampler"), self._step.phase("sampling"):
            numbered = [replace(request, id=i) for i, request in enumerate(asked)]
            told = iter(self._step.rollout.generate(numbered))
        drawn = [_went_on(under, told) for under in pool.under_way]
        done = [under for under in drawn if not any(map(_left, under.first, under.drawn))]
        pool.under_way = [under for under in drawn if any(map(_left, under.first, under.drawn))]
        if done:
            with clock("score", of="sampler"), self._step.phase("scoring"):
                problems, transcripts = [under.problem for under in done], [t for u in done for t in _transcripts(u)]
                groups = score(problems, transcripts, self._step.environment)
            pool.done += [(under.number, group) for under, group in zip(done, groups, strict=True)]
        return done

    def _requests(self, under: Unfinished) -> Iterator[Request]:
        """Asks for what follows the tokens of every sample that is not done."""
        for first, so_far in zip(under.first, under.drawn, strict=True):
            if left := _left(first, so_far):
                ids = first.prompt_ids + (so_far.token_ids if so_far else ())
                sampling = replace(first.sampling, max_new_tokens=min(self._tokens, left))
                yield replace(first, prompt_ids=ids, sampling=sampling)

    def _take(self, parts: tuple[Part, ...], rounds: int) -> Taken:
        """Takes the oldest groups, of those that teach something first."""
        pool, step = self.pool, self._step
        done = sorted(pool.done, key=lambda one: one[0])
        anew = step.rounds > 1  # further problems were drawn in the place of those that teach nothing
        ranked = sorted(done, key=lambda one: anew and not has_signal(one[1]))  # stable
        taken, rest = ranked[: step.prompts], ranked[step.prompts :]
        dropped = [group for _, group in rest if anew and not has_signal(group)]
        pool.done = [one for one in rest if not anew or has_signal(one[1])]
        return Taken(
            groups=[group for _, group in sorted(taken, key=lambda one: one[0])],
            rounds=rounds,
            dropped=len(dropped),
            parts=parts,
            gone=tuple(_seed(c) for group in dropped for sample in group.samples for c in sample.completions),
            carried=sum(bool(_left(*pair)) for u in pool.under_way for pair in zip(u.first, u.drawn, strict=True)),
            waiting=len(pool.done),
            sequences=step.prompts * len(ranked[0][1].samples) // step.mini_batches,
        )


def _waited(under: Unfinished) -> Unfinished:
    """Notes what each sample has when a step begins."""
    return replace(under, before=tuple(len(c.token_ids) if c else 0 for c in under.drawn))


def _left(first: Request, drawn: Completion | None) -> int:
    """Counts the tokens that a sample may still draw; 0 where it is done."""
    if drawn is None:
        return first.sampling.max_new_tokens
    return first.sampling.max_new_tokens - len(drawn.token_ids) if drawn.finish_reason == "length" else 0


def _went_on(under: Unfinished, told: Iterator[Completion]) -> Unfinished:
    """Adds to every sample that is not done the next one of what was drawn."""
    pairs = zip(under.first, under.drawn, strict=True)
    return replace(under, drawn=tuple(_added(first, c, next(told)) if _left(first, c) else c for first, c in pairs))


def _added(first: Request, before: Completion | None, more: Completion) -> Completion:
    """Joins what a sample drew and what it drew on, as one completion of its first request."""
    if before is None:
        return replace(more, request_id=first.id, sampling=first.sampling)
    return replace(
        more,
        request_id=first.id,
        sampling=first.sampling,
        token_ids=before.token_ids + more.token_ids,
        logprobs=before.logprobs + more.logprobs,
        versions=before.token_versions + more.token_versions,
        cached_tokens=before.cached_tokens,
    )


def _transcripts(under: Unfinished) -> list[Transcript]:
    """Returns the sequences of a problem whose samples are done."""
    return [(first.prompt_ids, c) for first, c in zip(under.first, under.drawn, strict=True) if c]


def _parts(under: Unfinished) -> Iterator[Part]:
    """Yields what each sample of a problem drew since the step began."""
    for first, drawn, before in zip(under.first, under.drawn, under.before, strict=True):
        if drawn and before < len(drawn.token_ids):
            rest = replace(
                drawn,
                token_ids=drawn.token_ids[before:],
                logprobs=drawn.logprobs[before:],
                versions=drawn.token_versions[before:],
            )
            yield Part(first.prompt_ids + drawn.token_ids[:before], before, rest)


def _joined(parts: dict[int, np.ndarray], tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns of each of a sample's `tokens` whether it was compared, the trainer's log-prob (float32), and its place."""
    known, values = np.zeros(tokens, dtype=bool), np.full(tokens, np.nan, dtype=np.float32)
    for first, some in parts.items():
        known[first : first + len(some)], values[first : first + len(some)] = True, some
    return known, values, np.arange(tokens)


def _seed(completion: Completion) -> int:
    """Returns what tells a sample from all others of the run."""
    return completion.sampling.seed
