"""Plain `key=value` arguments into a dataclass of int, float, bool, str and Literal fields, any of which may be `| None`."""

import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


class ArgumentError(ValueError):
    """Says, in one line, that an argument is wrong: names the argument and what it may be."""


def parse(kind: type[Config], arguments: Sequence[str]) -> Config:
    """Makes a `kind` of `key=value` arguments; ArgumentError for a key that is unknown or given twice, or a bad value."""
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ArgumentError(f"{argument!r} is not of the form key=value; keys: {', '.join(known)}")
        if name not in known:
            raise ArgumentError(f"unknown key {name!r}; keys: {', '.join(known)}")
        if name in found:
            raise ArgumentError(f"{name} is given twice")
        found[name] = _value(name, hints[name], text)
    return kind(**found)


def _value(name: str, hint: Any, text: str) -> Any:
    union = get_origin(hint) in (Union, types.UnionType)
    kinds = [k for k in get_args(hint) if k is not type(None)] if union else [hint]
    if union and text == "null":
        return None
    if not text:
        raise ArgumentError(f"{name}= is empty" + (f": leave it out, or say {name}=null" if union else ""))
    kind = str if get_origin(kinds[0]) is Literal else kinds[0]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ArgumentError(f"{name}={text} must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ArgumentError(f"{name}={text} must be {'an integer' if kind is int else 'a number'}") from None
