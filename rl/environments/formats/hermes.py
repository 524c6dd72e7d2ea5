"""Reads <tool_call>{"name": ..., "arguments": {...}}</tool_call>, as Hermes, Qwen2.5 and Qwen3 write it."""

import json
import re
from collections.abc import Mapping
from typing import Any

from rl.environments.formats.call import Call, named, spoken

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


def calls(text: str, tools: Mapping[str, Any]) -> list[Call]:
    """Returns the calls in a text, in their order; one that is not closed or no JSON is an error."""
    return [_call(inside, end, tools) for inside, end in _CALL.findall(spoken(text))]


def _call(inside: str, end: str, tools: Mapping[str, Any]) -> Call:
    if not end:
        return Call("", error="a <tool_call> is not closed")
    try:
        said = json.loads(inside)
    except (ValueError, RecursionError) as error:
        return Call("", error=f"a <tool_call> holds no JSON: {error}")
    if not isinstance(said, dict) or "name" not in said:
        return Call("", error='a <tool_call> holds {"name": ..., "arguments": {...}}')
    return named(said["name"], said.get("arguments", {}), tools)
