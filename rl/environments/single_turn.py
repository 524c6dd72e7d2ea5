"""Plays one prompt and one completion."""

from collections.abc import Sequence

from rl.data import Problem
from rl.environments.environment import Generate
from rl.rewards.reward import Reward
from rl.samples import Sample, Transcript, completions
from rollout.sampling import Request
from rollout.tokenizer import Tokenizer


class SingleTurn:
    """Judges the text of the completion, without the tokens that end it."""

    def __init__(self, tokenizer: Tokenizer, reward: Reward) -> None:
        self.tokenizer, self.reward = tokenizer, reward

    def play(self, requests: Sequence[Request], generate: Generate) -> list[Transcript]:
        """Generates one completion of each request's prompt."""
        return [(r.prompt_ids, done) for r, done in zip(requests, generate(requests), strict=True)]

    def judge(self, problem: Problem, transcript: Transcript) -> Sample:
        """Decodes the one completion and gives it the reward of its text."""
        (completion,) = completions(transcript)
        text = self.tokenizer.decode(completion.token_ids)
        return Sample(transcript, text, self.reward(problem, text))
