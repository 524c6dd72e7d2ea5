"""A call of a tool, as a model wrote it."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_THOUGHT = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """Names a tool and its arguments, or says what is wrong with what was written; that costs nothing but is answered."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    id: str = ""  # where the family's answers name the call


def spoken(text: str) -> str:
    """Returns a text without what was only thought; the prompt may have begun the first thought."""
    before, end, after = text.partition("</think>")
    return _THOUGHT.sub("", after if end and "<think>" not in before else text)


def named(name: Any, arguments: Any, tools: Mapping[str, Any]) -> Call:
    """Makes a call, or an error of what names no tool or gives no arguments by name."""
    if not isinstance(name, str) or name not in tools:
        return Call(str(name), error=f"no tool {name!r}; there are: {', '.join(tools)}")
    if isinstance(arguments, str):  # JSON in JSON
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        return Call(name, error=f"the arguments of {name} are no object")
    return Call(name, dict(arguments))
