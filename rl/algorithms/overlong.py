"""Says what becomes of samples that are too long: a penalty near the limit, and no lesson from what was cut off (Yu et al.
2025, "DAPO", section 3.4)."""

from collections.abc import Sequence

from rl.algorithms.advantages import Rewards
from rl.samples import Group, Sample


def shaped(groups: Sequence[Group], buffer: int, limit: int) -> list[Rewards]:
    """Returns the rewards of each group with DAPO's penalty (equation 13) added to each: for a longest completion of n tokens,
    `buffer` > 0 and limit = rollout.max_new_tokens

        0                              up to limit - buffer tokens
        (limit - buffer - n) / buffer  beyond, falling to -1 at the limit
    """
    if not buffer:
        return [group.rewards for group in groups]
    return [
        [None if s.reward is None else s.reward + _penalty(_longest(s), buffer, limit) for s in group.samples]
        for group in groups
    ]


def _longest(sample: Sample) -> int:
    return max((len(c.token_ids) for c in sample.completions), default=0)


def _penalty(length: int, buffer: int, limit: int) -> float:
    return max(-1.0, min(0.0, (limit - buffer - length) / buffer))


def cut_off(sample: Sample) -> bool:
    """Says whether a completion of the sample ended because it reached its limit."""
    return any(c.finish_reason == "length" for c in sample.completions)
