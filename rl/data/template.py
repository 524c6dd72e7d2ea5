"""Makes prompts from a template, and refuses one that cannot tell problems apart."""

import re
from collections.abc import Iterable
from string import Formatter
from typing import Any

from rl.errors import UserError

# Commands of LaTeX that begin as a typed line break or tab does
_LATEX = (
    "nabla natural ncong ne nearrow neg neq newline nexists ngeq ngtr ni nleq nless nmid nonumber not notin nparallel nprec "
    "nsim nsubseteq nsucc nu nwarrow tan tanh tau tbinom text textbf textit textrm texttt textstyle tfrac theta therefore "
    "tilde times to top triangle triangleq"
)
_TYPED = re.compile(rf"(?<!\\)\\(?!(?:{'|'.join(_LATEX.split())})(?![A-Za-z]))([nt])")


def typed(text: str) -> str:
    """Returns `text` with the line breaks and tabs that a shell leaves as the two characters \\n and \\t; \\neq stays."""
    return _TYPED.sub(lambda found: {"n": "\n", "t": "\t"}[found[1]], text)


def fill(template: str, /, *groups: str, **fields: Any) -> str:
    """Makes the prompt of one problem. UserError where the template asks for what there is not, or for nothing."""
    known = ", ".join(f"{{{name}}}" for name in (*range(len(groups)), *fields)) or "the groups of data.pattern"
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        # A method's text has an address, another one in each process
        if attributes := [name for name in names if "." in name]:
            raise AttributeError(f"{attributes[0]!r} is an attribute, and no text of a problem")
        prompt = template.format(*groups, **fields)
    except (LookupError, ValueError, AttributeError, TypeError) as error:  # it may ask for an attribute, or an item
        raise UserError(f"data.prompt={template!r}: {type(error).__name__} {error}; it may use {known}") from None
    if template and not names:
        raise UserError(f"data.prompt={template!r} makes every prompt alike: it uses no field, and may use {known}")
    return prompt


def check_apart(template: str, made: Iterable[tuple[str, str, str, str]]) -> str:
    """Returns what to warn of, or "". `made`: (where, question, prompt, answer) of each problem. UserError where problems with
    other questions and other answers have one prompt: nothing could then answer both."""
    first: dict[str, tuple[str, str, str]] = {}
    twice: list[str] = []
    for where, question, prompt, answer in made:
        there, asked, known = first.setdefault(prompt, (where, question, answer))
        if answer == known or not prompt:
            continue
        if asked != question:
            raise UserError(
                f"data.prompt={template!r} makes one prompt of two problems with different answers: {prompt!r} of {there!r} "
                f"({known!r}) and {where!r} ({answer!r})"
            )
        twice.append(f"{there} ({known!r}) and {where} ({answer!r})")
    return f"{len(twice)} questions are asked again with another answer, first: {twice[0]}" if twice else ""
