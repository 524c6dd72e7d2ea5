"""Reads name(arguments) as a whole text: short enough for a model of a few characters. Where the tool has one argument, a text,
it is what stands between the brackets; else they are JSON values, in the order of the signature."""

import json
import re
from collections.abc import Mapping
from typing import Any

from rl.environments.formats.call import Call, named

_CALL = re.compile(r"\s*(\w+)\((.*)\)\s*", re.DOTALL)


def calls(text: str, tools: Mapping[str, Any]) -> list[Call]:
    """Returns the one call that the text is, or none. Where it is no tool's name it is a text like any other."""
    found = _CALL.fullmatch(text)
    if not found or found[1] not in tools:
        return []
    name, inside = found[1], found[2]
    parameters = tools[name].get("properties", {})
    if len(parameters) == 1 and next(iter(parameters.values())).get("type") == "string":
        return [named(name, dict.fromkeys(parameters, inside), tools)]
    try:
        values = json.loads(f"[{inside}]")
    except (ValueError, RecursionError):
        return [Call(name, error=f"the arguments of {name} are no JSON values")]
    if len(values) > len(parameters):
        return [Call(name, error=f"{name} takes {len(parameters)} argument(s): {', '.join(parameters)}")]
    return [named(name, dict(zip(parameters, values, strict=False)), tools)]
