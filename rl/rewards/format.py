"""Rewards the form of a completion."""

import re

from rl.data.problem import Problem

_NO_TAG = r"(?:(?!</?(?:think|answer)>).)*"
_THINKS = rf"\s*<think>{_NO_TAG}</think>\s*<answer>{_NO_TAG}</answer>\s*"


def format(problem: Problem, text: str, pattern: str = _THINKS) -> float:
    """Earns 1 where the whole completion matches the regular expression `pattern`, in which a dot is any character, else 0."""
    return float(re.fullmatch(pattern, text, re.DOTALL) is not None)
