"""Reads [TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}], and [TOOL_CALLS]name[ARGS]{...} of later tokenizers, as
Mistral writes them."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rl.environments.formats.call import Call, named, spoken

_MARK = "[TOOL_CALLS]"
_LATER = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*(\w*)\s*)?\[ARGS\](.*)", re.DOTALL)
_ID = re.compile(r"[A-Za-z0-9]{9}")


def calls(text: str, tools: Mapping[str, Any]) -> list[Call]:
    """Returns the calls in a text, in their order; each has an id, by which its answer is told: the one that the policy wrote,
    if the chat template takes it. What is no JSON is an error."""
    _, mark, said = spoken(text).partition(_MARK)
    found = list(_calls(said, tools)) if mark else []
    return [call if _ID.fullmatch(call.id) else replace(call, id=f"{i:09d}") for i, call in enumerate(found)]


def _calls(said: str, tools: Mapping[str, Any]) -> Iterator[Call]:
    if "[ARGS]" not in said:
        yield from _listed(said, tools)
        return
    for one in said.split(_MARK):
        found = _LATER.fullmatch(one)
        if not found:
            yield Call("", error=f"a call is {_MARK}NAME[ARGS]{{...}}")
            continue
        try:
            yield replace(named(found[1], json.loads(found[3]), tools), id=found[2] or "")
        except (ValueError, RecursionError) as error:
            yield Call(found[1], error=f"the arguments of {found[1]} are no JSON: {error}", id=found[2] or "")


def _listed(said: str, tools: Mapping[str, Any]) -> Iterator[Call]:
    try:
        listed = json.loads(said)
    except (ValueError, RecursionError) as error:
        yield Call("", error=f"what follows {_MARK} is no JSON: {error}")
        return
    for one in listed if isinstance(listed, list) else [listed]:
        if not isinstance(one, dict) or "name" not in one:
            yield Call("", error=f'{_MARK} is followed by [{{"name": ..., "arguments": {{...}}}}]')
            continue
        yield replace(named(one["name"], one.get("arguments", {}), tools), id=str(one.get("id", "")))
