"""Whether a text states the right answer. Costs little for any text, and no clock decides: a reward that depended on how
fast a machine is would end the claim that a run is the same everywhere."""

import logging
import math
import operator
import re
from functools import reduce
from typing import Any

import sympy
from math_verify import parse, verify

_CHARACTERS = 400  # of a claim: the last ones count
_BITS = 4096.0  # of the largest number that judging may compute
_NODES = 200  # of an expression
_GROWS = (sympy.exp, sympy.sin, sympy.cos, sympy.tan, sympy.log, sympy.Abs)
_COLLECTS = (sympy.Tuple, sympy.FiniteSet, sympy.Interval, sympy.Union, sympy.core.relational.Relational)
# Reading LaTeX already evaluates some commands (a binomial, a power of a matrix): these do not.
_COMMANDS = re.compile(
    "frac|dfrac|tfrac|sqrt|boxed|fbox|text|mathrm|mbox|mathbf|left|right|cdot|times|div|pi|infty|pm|circ|degree|in|cup|cap"
    "|le|leq|ge|geq|ne|neq|lt|gt|ln|log|sin|cos|tan|exp|quad|qquad|displaystyle|alpha|beta|gamma|theta"
)

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit; `_bits` is the limit


def same_answer(claim: str, answer: str) -> bool:
    """By math-verify. False for a claim that could take long to evaluate, such as 9^9^9."""
    claim = claim[-_CHARACTERS:]
    if not all(_COMMANDS.fullmatch(c) for c in re.findall(r"\\([a-zA-Z]+)", claim)):
        return False
    stated = [e for e in _parse(claim) if isinstance(e, str) or _is_cheap(e)]
    return bool(stated) and bool(verify(_parse(answer), stated, timeout_seconds=None))


def _parse(text: str) -> list[Any]:
    return parse(text, parsing_timeout=None)


def _is_cheap(expression: Any) -> bool:
    if not isinstance(expression, sympy.Basic):
        return False
    nodes = sum(1 for _, _ in zip(sympy.preorder_traversal(expression), range(_NODES + 1), strict=False))
    return nodes <= _NODES and _bits(expression) <= _BITS


def _bits(e: Any) -> float:
    """A bound on the bits of the numbers that evaluating `e` computes; infinite for what may take any time at all."""
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
