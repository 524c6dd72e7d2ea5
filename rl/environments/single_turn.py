"""Plays one prompt and one completion."""

from collections.abc import Sequence

from rl.data import Problem
from rl.environments.environment import Generate
from rl.rewards.claim import Claim
from rl.rewards.reward import Reward
from rl.samples import Sample, Transcript, completions
from rollout.sampling import Request
from rollout.tokenizer import Tokenizer


class SingleTurn:
    """Judges the text of the completion, without the tokens that end it."""

    def __init__(self, tokenizer: Tokenizer, reward: Reward) -> None:
        self.tokenizer, self.reward = tokenizer, reward

    @property
    def judged_by(self) -> str:
        """Says who judges."""
        return self.reward.name

    def play(
        self, requests: Sequence[Request], generate: Generate, problems: Sequence[Problem] = ()
    ) -> list[Transcript]:
        """Generates one completion of each request's prompt."""
        return [(r.prompt_ids, done) for r, done in zip(requests, generate(requests), strict=True)]

    def judge(self, problems: Sequence[Problem], transcripts: Sequence[Transcript]) -> list[Sample]:
        """Decodes the one completion of each and gives it the reward of its text."""
        claims = []
        for problem, transcript in zip(problems, transcripts, strict=True):
            (completion,) = completions(transcript)
            claims.append(Claim(problem, self.tokenizer.decode(completion.token_ids), completion.token_ids))
        verdicts = self.reward.judge(claims)
        return [
            Sample(transcript, claim.text, v.reward, v.parts, v.notes, v.error)
            for transcript, claim, v in zip(transcripts, claims, verdicts, strict=True)
        ]
