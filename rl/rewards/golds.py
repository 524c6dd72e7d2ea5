"""Judges the gold solutions by their own answers: a reward that they do not earn, no completion will."""

from rl.data.problem import Problem, Source
from rl.errors import UserError
from rl.rewards.reward import Reward

_TRIED = 64  # golds that a user's reward judges: it may be slow


def check_golds(source: Source, reward: Reward, by_tokens: bool) -> str:
    """Returns what to warn of, or "". UserError where no gold earns 1 by the data's own verifier; a user's reward has a scale
    of its own, and is only warned of. `by_tokens`: judges what the tokenizer makes of each solution, as of a completion."""
    golds = list({p.id: p for p in (*source.train, *source.held_out)}.values())
    if reward.of_user:
        golds = golds[:: -(-len(golds) // _TRIED)]
        reward(golds[0], "")  # a completion may be empty: found wrong now, not after the warm start
        golds = [p for p in golds if p.solution]  # there may be none that a reward of its own needs
    failed = [(p, text, earned) for p in golds if (earned := reward(p, text := _said(source, p, by_tokens))) < 1]
    if not failed:
        return ""
    problem, text, earned = failed[0]
    line = (
        f"{len(failed)} of {len(golds)} golds do not earn 1 by {reward.name}, first: {problem.id}: the answer is "
        f"{problem.answer!r}, and {_end(text)!r} earns {earned:g}"
    )
    if len(failed) == len(golds) and not reward.of_user:
        raise UserError(line)
    return line


def _said(source: Source, problem: Problem, by_tokens: bool) -> str:
    if not by_tokens:
        return problem.solution
    return source.tokenizer.decode(source.encode_solution(problem))


def _end(text: str) -> str:
    return text if len(text) <= 80 else f"...{text[-80:]}"
