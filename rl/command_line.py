"""Reads the command line: flags, and overrides in Hydra's grammar."""

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rl.errors import UserError

PATHS = (
    *("out_dir", "resume", "model.path", "data.path", "data.held_out", "data.chat_template"),
    *("algorithm.reference", "algorithm.teacher"),
)
"""Keys whose value may begin with ~, a home."""

_RUN = ("-m", "--multirun", "-r", "--run")
_SHOW = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info")
_COMPLETION = ("-sc", "--shell-completion")
_CONFIG = ("-cn", "--config-name", "-cp", "--config-path", "-cd", "--config-dir")
_KEY = re.compile(r"(\+{0,2}[\w./@]+)=(.*)", re.DOTALL)
_GRAMMAR = re.compile(r"""['"\[\]{}(),]""")  # a value that holds one of these means it


def split(arguments: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Sorts arguments into (flags, overrides, whether the flags ask to be shown something and not to run). UserError for a flag
    that there is not."""
    flags = [a for a in arguments if a.startswith("-")]
    names = [flag.partition("=")[0] for flag in flags]
    shows = any(name in _SHOW + _COMPLETION for name in names)
    for flag, name in zip(flags, names, strict=True):
        if name in _CONFIG:
            raise UserError(
                f"{flag}: there is one config, configs/train.yaml: choose with +recipe=NAME, model=NAME, data=NAME"
            )
        if name not in _RUN + _SHOW + _COMPLETION:
            raise UserError(
                f"unknown flag {flag}: a run is told by key=value, +recipe=NAME and -m; --cfg job shows its config"
            )
    values = [a for a in arguments if not a.startswith("-")]
    return flags, [a for a in values if "=" in a or a.startswith("~")] if shows else values, shows


def readable(overrides: Sequence[str]) -> list[str]:
    """Writes `overrides` as Hydra's grammar has them. A value that it cannot read, and that holds none of its signs, is a text:
    resume=runs/seed=0 needs no quotes, and out_dir=~/runs is a folder at home."""
    return [_readable(override) for override in overrides]


def quoted(key: str, text: str) -> str:
    """Writes the override that sets `key` to `text`, whatever it holds."""
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return f"{key}='{text}{text[len(text.rstrip(chr(92))) :]}'"


def at_home(path: str) -> str:
    """Returns `path` with the home that it begins with, if it does. ValueError where there is no such home."""
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"{path.partition('/')[0]} is no home (./{path} is a folder of that name)")
    return expanded


def _readable(override: str) -> str:
    found = _KEY.fullmatch(override)
    if found and found[1].lstrip("+") in PATHS and found[2].startswith("~") and not _GRAMMAR.search(found[2]):
        try:
            return quoted(found[1], at_home(found[2]))
        except ValueError as error:
            raise UserError(f"{override}: {error}") from None
    try:
        OverridesParser.create().parse_override(override)
        return override
    except HydraException as error:
        if found and found[2] and not _GRAMMAR.search(found[2]):
            return quoted(found[1], found[2])
        reason = " ".join(str(error).split("See https://")[0].split())
        hint = f": a text needs quotes of its own: \"{found[1]}='...'\"" if found else ""
        raise UserError(f"{override}: not an override ({reason}){hint}") from None
