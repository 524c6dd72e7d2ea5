"""Draws problems from reasoning-gym, which judges them by the verifier of their task."""

import re
import string
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rl.data import tokenizer as tokenizers
from rl.data.problem import Problem, Source, is_held_out
from rl.data.section import ReasoningGymSection
from rl.data.template import check_apart, fill
from rl.errors import UserError
from rl.run.screen import Waiting
from rollout.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

Entries = list[tuple[str, Mapping[str, Any]]]
"""Prompts, and what reasoning-gym says of each."""


class Drawn:
    """Holds problems that were drawn, before there is a tokenizer."""

    template: str | None = None  # they are no conversations

    def __init__(
        self,
        section: ReasoningGymSection,
        seed: int,
        solutions: bool,
        console: "Console | None" = None,
        talks: bool = False,
    ) -> None:
        """`talks`: a tokenizer of characters has all that are printed, for the talk with an environment. UserError for a task
        or a pattern that gives none, or that gives no solution where they are needed."""
        self._section, self._dataset, self._talks = section, _dataset(section, seed), talks
        self._found = _draw(self._dataset, section, console)
        if solutions and (without := next((p for p, e in self._found if e["answer"] is None), None)):
            raise UserError(
                f"data.task={section.task} gives no solution of {without!r}, which a warm start and a tokenizer made from the "
                f"data need: set warmup.steps=0 and model.path=DIR"
            )

    def texts(self) -> Iterator[str]:
        """Yields the texts of prompts and answers."""
        return (text for prompt, entry in self._found for text in (prompt, entry["answer"]))

    def tokenizer(self) -> Tokenizer:
        """Makes one of their characters."""
        return tokenizers.of_characters([*self.texts(), *([string.printable] if self._talks else [])])

    def source(self, tokenizer: Tokenizer, made: bool) -> Source:
        """Makes the problems, whatever their tokenizer was made from."""
        unique = {prompt: entry for prompt, entry in reversed(self._found)}  # the first draw of a prompt stands for it

        def problem(prompt: str) -> Problem:
            entry = unique[prompt]
            ids = tokenizer.encode(prompt)
            answer = entry["answer"] or ""
            return Problem(prompt, prompt, ids, answer, answer, entry)

        def judge(problem: Problem, text: str) -> float:
            return float(self._dataset.score_answer(answer=text, entry=problem.record))

        # The held-out prompts are a function of the prompt alone; what is drawn more often is trained on more often.
        train = [problem(prompt) for prompt, _ in self._found if not is_held_out(prompt)]
        held_out = [problem(prompt) for prompt in sorted(unique) if is_held_out(prompt)]
        return Source(train, held_out, judge, tokenizer, verifier=f"the verifier of {self._section.task}")


def _dataset(section: ReasoningGymSection, seed: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if section.task not in DATASETS:
        known = ", ".join(sorted(DATASETS)[:8])
        raise UserError(f"data.task={section.task!r} is no reasoning-gym dataset; some are: {known}")
    try:
        return reasoning_gym.create_dataset(section.task, size=2**31, seed=seed, **section.args)
    except Exception as error:  # each task checks its arguments in its own way, or not at all
        raise _bad_arguments(section, error) from None


def _bad_arguments(section: ReasoningGymSection, error: Exception) -> UserError:
    given = ", ".join(section.args)
    said = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"data.args of {section.task}: {said} (given: {given}; ~data.args.NAME removes one)")


def _draw(dataset: Any, section: ReasoningGymSection, console: "Console | None") -> Entries:
    """Draws the first `section.problems` that the pattern matches."""
    try:
        pattern = re.compile(section.pattern)
    except re.error as error:
        raise UserError(f"data.pattern: {error}") from None
    found: Entries = []
    with Waiting(console, f"drawing problems of {section.task}", section.problems) as waiting:
        for i in range(1000 * section.problems):
            try:
                entry = dataset[i]
            except Exception as error:  # what it did not check, it may stumble over
                raise _bad_arguments(section, error) from None
            if match := pattern.fullmatch(entry["question"]):
                found.append((fill(section.prompt, *match.groups(default="")), entry))
                waiting.done = len(found)
                if len(found) == section.problems:
                    break
            elif i >= 10_000 and not found:
                raise UserError(f"data.pattern matches none of 10000 questions such as {entry['question']!r}")
    check_apart(section.prompt, ((e["question"], e["question"], p, str(e["answer"])) for p, e in found))
    return found
