"""Makes problems that are a number each: what they are about, their environment makes of it."""

import string
from collections.abc import Iterator

from rl.data import tokenizer as tokenizers
from rl.data.problem import Problem, Source, is_held_out
from rl.data.section import NumberedSection
from rl.data.template import fill
from rl.errors import UserError
from rollout.tokenizer import Tokenizer

LETTERS = string.printable
"""What a model of characters needs to talk with an environment."""


class Numbered:
    """Holds as many prompts as the config asks for."""

    template: str | None = None  # they are no conversations

    def __init__(self, section: NumberedSection, taught: bool) -> None:
        """`taught`: a warm start would show solutions, which there are none of. UserError for a template without the number."""
        if taught:
            raise UserError(
                "data=numbered has no solutions to teach: set warmup.steps=0, or give the environment a teach()"
            )
        self._prompts = [fill(section.prompt, number=i) for i in range(section.problems)]
        if len(set(self._prompts)) < len(self._prompts):
            raise UserError(f"data.prompt={section.prompt!r} makes prompts alike: {{number}} is to stand in it whole")

    def texts(self) -> Iterator[str]:
        """Yields the prompts, and all characters."""
        yield LETTERS
        yield from self._prompts

    def tokenizer(self) -> Tokenizer:
        """Makes one of characters."""
        return tokenizers.of_characters(self.texts())

    def source(self, tokenizer: Tokenizer, made: bool) -> Source:
        """Makes the problems; nothing but their environment, or a reward of yours, judges them."""
        problems = [Problem(p, p, tokenizer.encode(p), "", "", {"number": i}) for i, p in enumerate(self._prompts)]
        train = [p for p in problems if not is_held_out(p.prompt)]
        held_out = [p for p in problems if is_held_out(p.prompt)]
        return Source(train, held_out, _nobody, tokenizer, verifier="its environment")


def _nobody(problem: Problem, text: str) -> float:
    raise UserError("data=numbered has no verifier: the environment has a get_reward, or name a reward=")
