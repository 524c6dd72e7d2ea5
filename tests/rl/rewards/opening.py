"""Opens rewards as a config names them, and judges by them."""

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from rl.data import Problem, Source
from rl.rewards.claim import Claim, Verdict
from rl.rewards.reward import Reward, open_reward
from rl.rewards.section import Rewards, ScoringSection

_REWARDS: TypeAdapter[Any] = TypeAdapter(Rewards)


def opened(source: Source, reward: Any = None, say: Any = print, **scoring: Any) -> Reward:
    """`reward`: as the config has it; `scoring`: keys that are not the default ones."""
    keys = {"errors": "fail", "workers": 2, "timeout": 300, "total": 3600} | scoring
    return open_reward(_REWARDS.validate_python(reward), source, ScoringSection(**keys), say)


def verdicts(reward: Reward, problems: Sequence[Problem], texts: Sequence[str]) -> list[Verdict]:
    """Judges text i as a completion of problem i."""
    return reward.judge([Claim(p, t, tuple(t.encode())) for p, t in zip(problems, texts, strict=True)])


def earned(reward: Reward, problem: Problem, *texts: str) -> list[float | None]:
    """Judges texts as completions of one problem."""
    return [v.reward for v in verdicts(reward, [problem] * len(texts), texts)]
