"""Judges conversations that were played, and says what is left out of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl.data import Problem
from rl.environments.conversation import Outcome, Played
from rl.errors import UserError
from rl.rewards.claim import Claim, Verdict
from rl.rewards.reward import Reward
from rl.samples import Sample, Transcript, completions
from rollout.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Judges by the run's reward, by what the environment itself says a conversation earned, or by the sum of both."""

    tokenizer: Tokenizer
    name: str  # of the environment
    reward: Reward | None  # None: the environment alone judges
    drop: Callable[[str], None] | None  # leaves out what fails, and tells of it; None: a failure is an error
    rewards: bool = True  # the environment has a say

    @property
    def judged_by(self) -> str:
        """Says who judges."""
        own = f"{self.name}.get_reward" if self.rewards else ""
        return " + ".join(filter(None, (self.reward.name if self.reward else "", own)))

    def judge(self, problems: Sequence[Problem], transcripts: Sequence[Transcript]) -> list[Sample]:
        """Gives each conversation what it earns; the text that is judged is that of its last completion."""
        played = [t if isinstance(t, Played) else Played.of(t, Outcome(())) for t in transcripts]
        claims = [self._claim(p, t) for p, t in zip(problems, played, strict=True)]
        kept = [c for c, t in zip(claims, played, strict=True) if not t.outcome.error]
        verdicts = iter(self.reward.judge(kept) if self.reward else [Verdict(None, {}) for _ in kept])
        return [
            self._sample(t, claim, Verdict(None, {}) if t.outcome.error else next(verdicts))
            for t, claim in zip(played, claims, strict=True)
        ]

    def _claim(self, problem: Problem, played: Played) -> Claim:
        said = completions(played)
        last = said[-1].token_ids if said else ()
        messages, state = played.outcome.messages, played.outcome.state
        return Claim(problem, self.tokenizer.decode(last), last, messages, state)

    def _sample(self, played: Played, claim: Claim, verdict: Verdict) -> Sample:
        outcome, counts = played.outcome, played.outcome.counts
        if outcome.error:
            return Sample(played, claim.text, None, error=self.failure(claim.problem, outcome.error), counts=counts)
        reward, parts = verdict.reward, dict(verdict.parts)
        if outcome.reward is not None:
            parts[self.name] = outcome.reward
            reward = outcome.reward if reward is None else reward + outcome.reward
        return Sample(
            played, claim.text, None if verdict.error else reward, parts, verdict.notes, verdict.error, counts
        )

    def failure(self, problem: Problem, how: str) -> str:
        """Says what failed, in one line."""
        return f"the environment {self.name} {how}; problem {problem.id!r}"

    def failed(self, problem: Problem, how: str, always: bool = False) -> None:
        """Tells of a conversation that is left out; UserError where a failure is an error, or `always`."""
        failure = self.failure(problem, how)
        if always or not self.drop:
            raise UserError(failure)
        self.drop(failure)


class Once:
    """Tells of the first of what it hears."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._told = say, False

    def __call__(self, failure: str) -> None:
        if not self._told:
            self._told = True
            self._say(
                f"{failure}: left out (environment.errors=drop), as all that follow; environment/errors counts them"
            )
