"""Reads {"name": ..., "parameters": {...}} as a whole text, as Llama 3 writes it; anything else is a text."""

import json
from collections.abc import Mapping
from typing import Any

from rl.environments.formats.call import Call, named

_TAG = "<|python_tag|>"


def calls(text: str, tools: Mapping[str, Any]) -> list[Call]:
    """Returns the one call that the text is, or none."""
    text = text.strip().removeprefix(_TAG).strip()
    if not text.startswith("{"):
        return []
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(said, dict) or "name" not in said or not {"parameters", "arguments"} & said.keys():
        return []
    return [named(said["name"], said.get("parameters", said.get("arguments")), tools)]
