"""Declares the keys of rewards: what judges, with which weight, and how judging is done."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer
from pydantic_core import PydanticCustomError

from rl.keys import nearest
from rl.section import Seconds, Section, Text

VERIFIER = "verifier"
"""What the data's own verifier is called in `reward`."""
BUILT_IN = {
    "answer": "rl.rewards.answer:answer",
    "code": "rl.rewards.code:code",
    "exact": "rl.rewards.exact:exact",
    "format": "rl.rewards.format:format",
    "http": "rl.rewards.http:Server",
    "judge": "rl.rewards.judge:judge",
    "length": "rl.rewards.length:length",
    "model": "rl.rewards.model:RewardModel",
}
"""Rewards that need no import path, and the functions that they are."""
BY_ANSWER = (VERIFIER, "answer", "exact")
"""Those that compare with a problem's answer: they judge no data without answers."""
OF_OTHERS = ("http", "judge", "model")
"""Those whose values are what a server or a library makes of the text: its bits are not ours to promise."""
MODEL = "model"
"""The one that holds a model: a single process judges, since each would load it."""
_RESERVED = ("mean", "std", "solved_frac", "groups_without_signal_frac", "left_out", "errors")
"""Metrics of another meaning."""


class RewardSection(Section):
    """Names one reward of a run."""

    function: Text = Field(description="module:function, path/to/file.py:function, or the name of a built-in one")
    weight: float = Field(default=1.0, ge=-1e6, le=1e6, description="of its value in the sum; 0: it is only logged")
    args: dict[str, Any] = Field(default={}, description="keyword arguments of every call")
    name: Text | None = Field(default=None, description="in the logs; null: that of the function")

    @property
    def called(self) -> str:
        """Returns its name in the logs."""
        return self.name or self.function.rpartition(":")[2]


def _as_list(value: Any) -> Any:
    """Reads what stands for a list: one text or one mapping; null is the data's verifier alone, as is its name: ()."""
    entries = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if value is not None and not entries:
        raise PydanticCustomError("no_reward", "names no reward; null is the data's own verifier")
    found = [_entry(e) for e in entries]
    return [] if found == [{"function": VERIFIER}] else found


def _entry(value: Any) -> Any:
    if isinstance(value, str):
        return {"function": value}
    if not isinstance(value, Mapping) or "function" not in value:
        raise PydanticCustomError("reward", "a reward is a text, module:function, or {function: module:function, ...}")
    if unknown := [key for key in value if key not in RewardSection.model_fields]:
        known = list(RewardSection.model_fields)
        meant = nearest(str(unknown[0]), known)
        hint = f" (did you mean {meant[0]}?)" if meant else ""
        said = {"key": str(unknown[0]), "hint": hint, "known": ", ".join(known)}
        raise PydanticCustomError("reward_key", "a reward has no key '{key}'{hint}; it has {known}", said)
    return value


def _as_short(rewards: tuple[RewardSection, ...]) -> Any:
    """Writes rewards in one way, whichever way they were given: as null, a text, or a list of all keys."""
    if not rewards:
        return None
    if len(rewards) == 1 and rewards[0] == RewardSection(function=rewards[0].function):
        return rewards[0].function
    return [reward.model_dump(mode="json") for reward in rewards]


def _apart(rewards: tuple[RewardSection, ...]) -> tuple[RewardSection, ...]:
    names = [reward.called for reward in rewards]
    for reward, name in zip(rewards, names, strict=True):
        if names.count(name) > 1 or name in _RESERVED:
            why = "is called as another one" if names.count(name) > 1 else "has the name of a metric"
            said = {"function": reward.function, "why": why, "name": name}
            raise PydanticCustomError("reward_name", "{function} {why}, {name}: give it a `name`", said)
        if reward.function == VERIFIER and reward.args:
            raise PydanticCustomError("reward_args", "the data's own verifier takes no args")
    return rewards


Rewards = Annotated[
    tuple[RewardSection, ...], BeforeValidator(_as_list), AfterValidator(_apart), PlainSerializer(_as_short)
]


OwnRewards = Annotated[
    tuple[RewardSection, ...] | None,
    BeforeValidator(lambda value: None if value is None else _as_list(value)),
    AfterValidator(lambda rewards: rewards and _apart(rewards)),
    PlainSerializer(lambda rewards: None if rewards is None else _as_short(rewards) or VERIFIER),
]
"""Those of a part of a run; None: those of the run, and () is the verifier of the part's own data."""


def reads_answers(rewards: Sequence[RewardSection]) -> bool:
    """Tells whether one of them compares with the answer of its problem, which then must be there."""
    return not rewards or any(reward.function in BY_ANSWER for reward in rewards)


class ScoringSection(Section):
    """Says how samples are judged. None of it decides what they earn, but for what is left out where time is up."""

    errors: Literal["fail", "drop"] = Field(
        description="what a reward that raises, crashes or takes too long does: end the run, or leave its sample out"
    )
    workers: Annotated[int, Field(gt=0, le=1024)] = Field(
        description="most processes that judge; started as they are needed"
    )
    timeout: Seconds = Field(description="seconds of one call of a reward")
    total: Seconds = Field(description="seconds of all calls for one batch of samples")
