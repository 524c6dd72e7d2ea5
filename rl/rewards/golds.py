"""Judges the gold solutions by their own answers: a reward that they do not earn, no completion will."""

from rl.data.problem import Problem, Source
from rl.errors import UserError
from rl.rewards.claim import Claim
from rl.rewards.reward import Reward

_TRIED = 64  # golds that a user's reward judges: it may be slow


def check_golds(source: Source, reward: Reward, by_tokens: bool) -> str:
    """Returns what to warn of, or "". UserError where no gold earns 1 by the data's own verifier; a user's reward has a scale
    of its own, and is only warned of; one that waits for a model is not asked yet. `by_tokens`: judges what the tokenizer makes
    of each solution, as of a completion."""
    if reward.waits:
        return ""
    golds = list({p.id: p for p in (*source.train, *source.held_out)}.values())
    if reward.of_user:
        golds = golds[:: -(-len(golds) // _TRIED)]
        # A completion may be empty: found wrong now, not after the warm start
        reward.judge([Claim(golds[0], "")], aloud=False)
        golds = [p for p in golds if p.solution]  # there may be none that a reward of its own needs
        if not golds:
            return ""
    claims = [_said(source, problem, by_tokens) for problem in golds]
    verdicts = reward.judge(claims, aloud=False)
    if not any(v.reward is not None for v in verdicts):
        raise UserError(verdicts[0].error or f"{reward.name} leaves all {len(golds)} golds out: it returns None")
    failed = [(c, v) for c, v in zip(claims, verdicts, strict=True) if v.reward is None or v.reward < 1]
    if not failed:
        return ""
    claim, verdict = failed[0]
    why = f": {verdict.error}" if verdict.error else ""
    earned = f"is left out{why}" if verdict.reward is None else f"earns {verdict.reward:g}"
    line = (
        f"{len(failed)} of {len(golds)} golds do not earn 1 by {reward.name}, first: {claim.problem.id}: the answer is "
        f"{claim.problem.answer!r}, and {_end(claim.text)!r} {earned}"
    )
    if len(failed) == len(golds) and not reward.of_user:
        raise UserError(line)
    return line


def _said(source: Source, problem: Problem, by_tokens: bool) -> Claim:
    if not by_tokens:
        return Claim(problem, problem.solution)
    ids = source.encode_solution(problem)
    return Claim(problem, source.tokenizer.decode(ids), ids)


def _end(text: str) -> str:
    return text if len(text) <= 80 else f"...{text[-80:]}"
