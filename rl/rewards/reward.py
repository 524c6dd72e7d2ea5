"""Judges completions by the rewards of a run, and says what went wrong where that fails."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any

from rl.data.problem import Judge, Source
from rl.errors import UserError
from rl.rewards.claim import Claim, Found, Verdict, found, raised
from rl.rewards.here import Here
from rl.rewards.placed import is_placed
from rl.rewards.pool import ImportFailed, Pool
from rl.rewards.section import BUILT_IN, MODEL, VERIFIER, RewardSection, ScoringSection
from rl.rewards.styles import Function
from rl.rewards.worker import Call, Wanted

_SHOWN = 300  # characters of a completion in a message


@dataclass(frozen=True)
class Part:
    """Holds one reward of a sum."""

    name: str
    weight: float
    judge: Judge | None = None  # of the data, called here; None: a function of the pool


class WeightedSum:
    """Adds up rewards: sum of weight x value over those that have a say, in float64, rounded once (math.fsum)."""

    def __init__(
        self, parts: Sequence[Part], pool: Pool | Here | None = None, drop: Callable[[str], None] | None = None
    ) -> None:
        """`drop`: leaves out samples whose reward fails, and tells of the first; None: a failure is an error."""
        self._parts, self._pool, self._drop = parts, pool, drop
        self._told = False

    def __call__(self, claims: Sequence[Claim], aloud: bool = True) -> list[Verdict]:
        """Judges claims; those of one problem stand side by side. UserError names the problem and the completion of the first
        one that fails. `aloud`: tells of the first that is left out."""
        columns = self._all_found(claims)
        verdicts = [self._verdict(claim, row) for claim, row in zip(claims, zip(*columns, strict=True), strict=True)]
        failed = next((verdict.error for verdict in verdicts if verdict.error), "")
        if failed and not self._drop:
            raise UserError(failed)
        if failed and self._drop and aloud and not self._told:
            self._told = True
            self._drop(f"{failed}: left out (scoring.errors=drop), as all that follow; reward/errors counts them")
        return verdicts

    def _all_found(self, claims: Sequence[Claim]) -> list[Sequence[Found]]:
        """Returns what each reward finds of each claim; where an error ends the run, of those that come after it nothing."""
        columns = [[_here(part.judge, claim) for claim in claims] if part.judge else [] for part in self._parts]
        of_function = [column for part, column in zip(self._parts, columns, strict=True) if not part.judge]
        for call, answer in self._answers(claims):
            of_function[call.function] += answer
        return [[*column, *[Found()] * (len(claims) - len(column))] for column in columns]

    def _answers(self, claims: Sequence[Claim]) -> list[tuple[Call, list[Found]]]:
        """Makes the calls of the pool; after an error that ends the run there are fewer answers than calls."""
        if not self._pool:
            return []
        calls = [call for i, kind in enumerate(self._pool.kinds) for call in _calls(i, kind.batched, claims)]
        try:
            return list(zip(calls, self._pool(calls, until_error=not self._drop), strict=False))
        except ImportFailed as error:
            names = [part.name for part in self._parts if not part.judge][error.which]
            how = f"could be imported once, and in another process not: {error.how}"
            raise UserError(f"the reward {', '.join(names)} {how}") from None

    def _verdict(self, claim: Claim, row: Sequence[Found]) -> Verdict:
        pairs = list(zip(self._parts, row, strict=True))
        if failed := next(((part, f) for part, f in pairs if f.error), None):
            return Verdict(None, {}, error=_failure(failed[0].name, failed[1].error, claim))
        parts = {part.name: f.value for part, f in pairs if f.value is not None}
        weighted = [part.weight * f.value for part, f in pairs if f.value is not None and part.weight]
        notes = {f"{part.name}/{what}": value for part, f in pairs for what, value in f.notes.items()}
        return Verdict(math.fsum(weighted) if weighted else None, parts, notes)


@dataclass(frozen=True)
class Reward:
    """Judges completions, in training and in evaluation alike. 1 or more is a right answer."""

    name: str  # what is said to judge
    judge: WeightedSum
    of_user: bool  # what a user chose has a scale of its own
    waits: bool = False  # a model of it is not there before the run's processes are


def open_reward(
    rewards: Sequence[RewardSection],
    source: Source,
    scoring: ScoringSection,
    say: Callable[[str], None] = print,
    objects: Mapping[str, Any] = MappingProxyType({}),
) -> Reward:
    """Opens what the config names; UserError where that cannot be imported or called. `say` tells of the first failure that
    leaves a sample out. `objects`: functions that are called in this process, by what the config calls them; as MODEL what
    stands for the reward models that actors of the run have."""
    name, of_user = judged_by(rewards, source), bool(rewards)
    rewards = rewards or (RewardSection(function=VERIFIER),)
    parts = [Part(r.called, r.weight, source.judge if r.function == VERIFIER else None) for r in rewards]
    chosen = [r for r in rewards if r.function != VERIFIER]
    pool = _open_calls(chosen, scoring, objects) if chosen else None
    drop = say if scoring.errors == "drop" else None
    return Reward(name, WeightedSum(parts, pool, drop), of_user, MODEL in objects and any(map(is_placed, chosen)))


def _open_calls(rewards: Sequence[RewardSection], scoring: ScoringSection, objects: Mapping[str, Any]) -> Pool | Here:
    mine, others = {}, []
    for i, reward in enumerate(rewards):
        if reward.function == MODEL:
            function = objects[MODEL].of(reward) if MODEL in objects and is_placed(reward) else None
        else:
            function = objects.get(reward.function)
        if function is None:
            others.append(reward)
            continue
        try:
            mine[i] = Function(function, {} if reward.function == MODEL else reward.args)
        except TypeError as error:
            raise UserError(f"reward={reward.function!r}: {error}") from None
    pool = _open_pool(others, scoring) if others else None
    return Here(mine, pool) if mine or not pool else pool


def judged_by(rewards: Sequence[RewardSection], source: Source) -> str:
    """Says what judges, with the weights that are not 1."""
    if not rewards:
        return source.verifier
    names = [source.verifier if r.function == VERIFIER else r.function for r in rewards]
    terms = [n if r.weight == 1 else f"{r.weight:g} x {n}" for n, r in zip(names, rewards, strict=True)]
    return f"reward={' + '.join(terms)}"


def _open_pool(rewards: Sequence[RewardSection], scoring: ScoringSection) -> Pool:
    wanted = [Wanted(BUILT_IN.get(r.function, r.function), r.args) for r in rewards]
    workers = 1 if any(r.function == MODEL for r in rewards) else scoring.workers
    try:
        return Pool(wanted, workers, scoring.timeout, scoring.total)
    except ImportFailed as error:
        names = [r.function for r in rewards][error.which]
        known = (
            "" if any(":" in n or n in BUILT_IN for n in names) else f"; {VERIFIER}, {', '.join(BUILT_IN)} are built in"
        )
        raise UserError(f"reward={', '.join(map(repr, names))} (module:function): {error.how}{known}") from None


def _calls(function: int, batched: bool, claims: Sequence[Claim]) -> Iterator[Call]:
    if batched:
        for _, group in groupby(claims, key=lambda claim: claim.problem.id):
            yield Call(function, tuple(group))
    else:
        for claim in claims:
            yield Call(function, (claim,))


def _here(judge: Judge, claim: Claim) -> Found:
    try:
        return found(judge(claim.problem, claim.text))
    except Exception as error:
        return Found(error=f"raised {raised(error)}")


def _failure(name: str, how: str, claim: Claim) -> str:
    text = claim.text
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"the reward {name} {how}; problem {claim.problem.id!r}, completion {shown!r}"
