"""Tells whether a text states the right answer. Costs little for any text, and no clock decides: a reward that depended on how
fast a machine is would end the claim that a run is the same everywhere."""

import logging
import math
import operator
import re
from functools import lru_cache, reduce
from typing import Any

import sympy
from math_verify import LatexExtractionConfig, parse, verify

from rl.data.problem import Problem

_CHARACTERS = 400  # of a claim: the last ones count
_SETTING = 100  # characters that may set a text: spaces, dollars, \\boxed, \\text, stars
_DEPTH = 6  # of brackets, and
_RAISED = 12  # powers and indices of one expression: the time of reading them grows with the power of their nesting
_BITS = 4096.0  # of the largest number that judging may compute
_NODES = 200  # of an expression
_GROWS = (sympy.exp, sympy.sin, sympy.cos, sympy.tan, sympy.log, sympy.Abs)
_COLLECTS = (sympy.Tuple, sympy.FiniteSet, sympy.Interval, sympy.Union, sympy.core.relational.Relational)
# Reading LaTeX already evaluates some commands (a binomial, a power of a matrix): these do not.
_COMMANDS = re.compile(
    "frac|dfrac|tfrac|sqrt|boxed|fbox|text|mathrm|mbox|mathbf|left|right|cdot|times|div|pi|infty|pm|circ|degree|in|cup|cap"
    "|le|leq|ge|geq|ne|neq|lt|gt|ln|log|sin|cos|tan|exp|quad|qquad|displaystyle|alpha|beta|gamma|theta"
)
_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)"
# One number, with what it counts: "$1,234", "18 dollars.", "1/2 cup", "about 5 %"
_QUANTITY = re.compile(rf"(?:[^\W\d_]+\s+)*[$€£¥]?{_NUMBER}(?:\s*/\s*\d+)?\s*(?:\\?%)?(?:\s+[^\W\d_]+)*\.?")
_SEPARATED = re.compile(r"(?<![\d.,])[$€£¥]?-?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])")
_WORD = re.compile(r"(?:^|(?<=[\s,;]))(?!(?:and|or)\b)[^\W\d_]{2,}(?=[\s,;.!?]|$)")  # that stands alone
_SCIENTIFIC = re.compile(r"(?<![\w\\])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?!\w)")
_APART = re.compile(r"\d\s+\d")  # numbers side by side: LaTeX would multiply or add them
_SPACED = re.compile(r"-?\d{1,3}(?:\s\d{3})+(?:\.\d+)?")  # but one of thousands, and
_MIXED = re.compile(r"(\d+)\s+(\d+)/(\d+)")  # one and a fraction
_ENDS = re.compile(r"\$+|\\[()\[\]]|\s\[|\]\s")  # of what math-verify takes for LaTeX
_WHOLE = (LatexExtractionConfig(),)

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit; `_bits` is the limit


def answer(problem: Problem, text: str, marker: str = "") -> float:
    """Earns 1 where the text, or what follows its last `marker`, states the problem's answer (`same_answer`), else 0."""
    return float(same_answer(text.rpartition(marker)[2] if marker else text, problem.answer))


def same_answer(claim: str, answer: str) -> bool:
    """Tells whether `claim` is the text of `answer`, or the same mathematics by math-verify; both may be LaTeX, bare or not.

    An answer is read whole, or not as mathematics at all: a part of it earns nothing. So is a claim that is one expression;
    in other claims math-verify finds what they state. False for a claim that could take long to evaluate, such as 9^9^9^9.
    """
    inside = boxed(claim)
    near = [said for said in (claim, inside) if len(said) < 2 * len(answer) + _SETTING]
    if plain(answer) in {plain(said) for said in near} - {""}:
        return True
    right = _right(answer)
    sympy.core.random.seed(0)  # some of its proofs try random numbers: every run shall try the same
    return bool(right) and bool(verify(list(right), _stated((inside or claim)[-_CHARACTERS:]), timeout_seconds=None))


def stated(text: str, marker: str | None = None) -> str:
    """Returns what a completion states: what follows its last `marker`, or else stands in its last \\boxed{...}, or all of it,
    without how it is set."""
    after = text.rpartition(marker)[2] if marker else text
    return plain(boxed(after) or after)


def without_separators(answer: str) -> str:
    """Drops the commas between thousands where the whole of `answer` is one number: "$1,234", and not "(1,234)"."""
    return answer.replace(",", "") if _QUANTITY.fullmatch(answer) and _SEPARATED.search(answer) else answer


def plain(text: str) -> str:
    """Returns what is said, without how it is set: no dollars, \\boxed, \\text or stars around it, nor a full stop after it."""
    text = " ".join(text.split())
    before = None
    while before != text:
        before = text
        text = re.sub(r"^(?:\*\*|\$\$?|\\\(|\\\[)(.*?)(?:\*\*|\$\$?|\\\)|\\\])$", r"\1", text.removesuffix(".")).strip()
        text = re.sub(r"^\\(?:boxed|fbox|text|mathrm|mbox|textbf|mathbf)\{([^{}]*)\}$", r"\1", text).strip()
        text = re.sub(r"^\(([^\W\d_])\)$", r"\1", text)  # a choice: (B)
    return text


def boxed(text: str) -> str:
    """Finds what stands in the last \\boxed{...}, braces of its own included; "" where nothing does."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:i]
    return ""


@lru_cache(maxsize=4096)
def _right(answer: str) -> tuple[Any, ...]:
    """Reads what an answer means as mathematics, read whole; nothing where it is words, or is too costly."""
    text = answer.strip()
    if len(text) > _CHARACTERS or not _is_readable(text):
        return ()
    found = _find(text) if _is_number(text) or _is_set(text) else _whole(text)
    return tuple(e for e in found if isinstance(e, str) or _is_cheap(e))


def _stated(claim: str) -> list[Any]:
    """Reads what a claim states: as one expression, where it is one, or what math-verify finds in it."""
    text, found = claim.strip(), []
    if not _is_readable(text):
        return []
    if not (_is_number(text) or _is_set(text)):
        found = _whole(text)
        unread = not any(isinstance(e, sympy.Basic) for e in found) and not _WORD.search(text)
        if unread and ("\\" in text or _APART.search(text)):
            return []  # LaTeX that cannot be read, or numbers side by side: one of these is not the claim
    if not any(isinstance(e, sympy.Basic) for e in found):
        found = _find(text)
    return [e for e in found if isinstance(e, str) or _is_cheap(e)]


def _find(text: str) -> list[Any]:
    return parse(text, parsing_timeout=None)


def _whole(text: str) -> list[Any]:
    """Reads `text` as one LaTeX expression; nothing where it is a letter, or holds words or numbers side by side."""
    if mixed := _MIXED.fullmatch(text):
        text = f"{mixed[1]}+{mixed[2]}/{mixed[3]}"
    if len(text) < 2 or _WORD.search(text) or _APART.search(text):
        return []
    latex = _SCIENTIFIC.sub(r"\1*10^{\2}", text)
    return parse(f"${latex}$", _WHOLE, parsing_timeout=None)


def _is_number(text: str) -> bool:
    """Tells whether math-verify finds one number in it, with or without its unit, and nothing else is there."""
    return bool(_QUANTITY.fullmatch(text) or _SPACED.fullmatch(text))


def _is_set(text: str) -> bool:
    """Tells whether it says itself where its mathematics stands: $...$, \\(...\\), \\boxed{...}."""
    return bool(re.search(r"\$|\\[(\[]|\\boxed|\\fbox", text))


def _is_readable(text: str) -> bool:
    """Tells whether reading `text` takes a moment, whatever it is."""
    if not all(_COMMANDS.fullmatch(c) for c in re.findall(r"\\([a-zA-Z]+)", text)):
        return False
    return all(_is_flat(part) for part in _ENDS.split(text))


def _is_flat(latex: str) -> bool:
    depth = deepest = 0
    for character in latex:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest + latex.count("|") / 2 <= _DEPTH and latex.count("^") + latex.count("_") <= _RAISED


def _is_cheap(expression: Any) -> bool:
    if not isinstance(expression, sympy.Basic):
        return False
    nodes = sum(1 for _, _ in zip(sympy.preorder_traversal(expression), range(_NODES + 1), strict=False))
    return nodes <= _NODES and _bits(expression) <= _BITS


def _bits(e: Any) -> float:
    """Bounds the bits of the numbers that evaluating `e` computes; infinite for what may take any time at all."""
    if isinstance(e, sympy.Rational):
        return float(int(e.p).bit_length() + int(e.q).bit_length())
    if e.is_Atom:
        return 64.0
    parts = [_bits(a) for a in e.args]
    if isinstance(e, sympy.Add | sympy.Mul):
        return reduce(operator.add, parts)
    if isinstance(e, sympy.Pow):
        exponent = e.args[1]
        if isinstance(exponent, sympy.Rational):
            return parts[0] * max(1.0, abs(float(exponent))) if parts[1] <= 32 else float("inf")
        if not exponent.is_number:
            return reduce(operator.add, parts)
        return parts[0] * (1 << math.ceil(parts[1])) if parts[1] <= 16 else float("inf")
    if isinstance(e, _GROWS):
        return 64.0 + max(parts) if max(parts) <= 128 else float("inf")
    return max(parts, default=0.0) if isinstance(e, _COLLECTS) else float("inf")
