"""Rewards the text of the answer."""

from rl.data.problem import Problem


def exact(problem: Problem, text: str, marker: str = "") -> float:
    """Earns 1 where the text is that of the answer, both without spaces around them, else 0; `marker`: judges what follows the
    last one."""
    said = text.rpartition(marker)[2] if marker else text
    return float(said.strip() == problem.answer.strip())
