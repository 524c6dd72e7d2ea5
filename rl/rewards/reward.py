"""Judges completions by the reward of a run, and says what went wrong where that fails."""

import math
from dataclasses import dataclass

from rl.data.problem import Judge, Problem, Source
from rl.errors import UserError
from rl.rewards.process import JudgeError, UserFunction

_LARGEST = 1e30  # of a reward: advantages are float32
_SHOWN = 300  # characters of a completion in a message


@dataclass(frozen=True)
class Reward:
    """Judges completions, in training and in evaluation alike. 1 is a right answer."""

    name: str  # what is said to judge
    judge: Judge
    of_user: bool  # a user's function has a scale of its own

    def __call__(self, problem: Problem, text: str) -> float:
        """Returns a finite float, or raises UserError that names the problem and the completion."""
        try:
            reward = float(self.judge(problem, text))
        except JudgeError as error:
            raise _failed(str(error), problem, text) from None
        except Exception as error:
            raise _failed(f"raised {type(error).__name__}: {error}", problem, text) from error
        if not math.isfinite(reward):
            raise _failed(f"is {reward}, not a number", problem, text)
        if abs(reward) > _LARGEST:
            raise _failed(f"is {reward}, beyond {_LARGEST}", problem, text)
        return reward


def open_reward(name: str | None, source: Source) -> Reward:
    """Opens the data's own verifier, or the user's `module:function`, whose module it imports."""
    if name is None:
        return Reward(source.verifier, source.judge, of_user=False)
    try:
        return Reward(f"reward={name}", UserFunction(name), of_user=True)
    except JudgeError as error:
        raise UserError(f"reward={name!r} (module:function): {error}") from None


def _failed(how: str, problem: Problem, text: str) -> UserError:
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return UserError(f"the reward {how}; problem {problem.id!r}, completion {shown!r}")
