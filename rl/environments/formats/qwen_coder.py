"""Reads <tool_call><function=NAME><parameter=NAME>value</parameter></function></tool_call>, as Qwen3-Coder and Qwen3.5 write
it. A value is a text, unless the tool's schema says otherwise."""

import json
import re
from collections.abc import Mapping
from typing import Any

from rl.environments.formats.call import Call, named, spoken

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def calls(text: str, tools: Mapping[str, Any]) -> list[Call]:
    """Returns the calls in a text, in their order; one that is not closed is an error."""
    return [_call(inside, end, tools) for inside, end in _CALL.findall(spoken(text))]


def _call(inside: str, end: str, tools: Mapping[str, Any]) -> Call:
    function = _FUNCTION.fullmatch(inside)
    if not end or not function:
        return Call(
            "", error="a call is <tool_call><function=NAME><parameter=NAME>value</parameter></function></tool_call>"
        )
    name, said = function[1].strip(), function[2]
    kinds = tools.get(name, {}).get("properties", {})
    return named(name, {key: _value(value, kinds.get(key, {})) for key, value in _PARAMETER.findall(said)}, tools)


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    if schema.get("type", "string") == "string":
        return text
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except (ValueError, RecursionError):
        return text
