"""Writes the pages that are generated: the configuration, from its schema, and every message of an error, from the code.

mkdocs calls `on_files` while it builds (mkdocs.yml), so that neither page is ever older than the code; nothing of them is
committed.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl.compose import CONFIGS  # noqa: E402
from rl.config import RunConfig, _sections  # noqa: E402
from rl.data.section import DATA  # noqa: E402
from rl.rewards.section import RewardSection  # noqa: E402
from rl.section import Section  # noqa: E402

BAD_INPUT = (
    "UserError ConfigError BatchError RequestError TreeError BuildError UnsupportedError ArgumentError CheckpointError"
)
CODES = {2: [*BAD_INPUT.split(), "ReportError", "FinishedError", "BadRequest"], 1: ["RunError", "SaveError", "RayLost"]}
CODES[1] += ["AlignmentError", "TrainerError", "RunnerError", "RankError", "RankLost", "OutOfMemory", "VerifyError"]
"""Errors that end a command in one line, by its exit code."""
PACKAGES = ("rl", "rollout", "trainer", "kernels")


def on_config(config: Any) -> Any:
    """Puts a page that the menu does not name at the end of the guides, so that none is lost (mkdocs)."""
    named = set(re.findall(r"[\w/]+\.md", json.dumps(config.nav)))
    guides = next(entry["Guides"] for entry in config.nav if "Guides" in entry)
    for path in sorted((ROOT / "docs").glob("*.md")):
        if path.name not in named:
            guides.append({path.stem.replace("_", " ").capitalize(): path.name})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages to those of the folder (mkdocs)."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def pages() -> dict[str, str]:
    """Returns the generated pages by name."""
    return {"configuration.md": configuration(), "messages.md": messages()}


# configuration --------------------------------------------------------------------------------------------------------


def configuration() -> str:
    """Returns the page of every key: its values, its default and what it means."""
    values = _composed()
    lines = [
        "# Configuration",
        "",
        "Every key of `python -m rl.train`, as `KEY=VALUE` on the command line or in a recipe. The defaults are those of the",
        "main job (`configs/train.yaml`), and of the group that `data=NAME` or `algorithm=NAME` chooses. An unknown key, or a",
        "value outside its range, ends the command with one line that names what was meant. `dry_run=true` shows a run before",
        "it starts. This page is written from the schema (`rl/config.py`) while the site is built.",
        "",
    ]
    top = {n: f for n, f in RunConfig.model_fields.items() if not _sections(f.annotation)}
    lines += ["## The run", "", *_table(top, values, ""), ""]
    for name, field in RunConfig.model_fields.items():
        below = _sections(field.annotation)
        if not below:
            continue
        if name == "data":
            for kind, section in DATA.items():
                lines += [
                    f"## data, of kind {kind}",
                    "",
                    _about(section),
                    "",
                    *_table(section.model_fields, _data(kind), "data."),
                ]
                lines.append("")
        elif name == "algorithm":
            lines += _algorithms(values[name])
        else:
            lines += [
                f"## {name}",
                "",
                _about(below[0]),
                "",
                *_table(below[0].model_fields, values[name], f"{name}."),
                "",
            ]
    lines += ["## An entry of `reward`", "", _about(RewardSection), "", *_table(RewardSection.model_fields, {}, ""), ""]
    return "\n".join(lines)


def _composed() -> dict[str, Any]:
    """The values of the main job, as its files have them: a null is a null."""
    values: dict[str, Any] = yaml.safe_load((CONFIGS / "train.yaml").read_text())
    return values | {"model": yaml.safe_load((CONFIGS / "model" / "tiny.yaml").read_text())}


def _algorithms(values: Mapping[str, Any]) -> list[str]:
    """The keys that all algorithms have, and then each one's own."""
    sections = {
        get_args(s.model_fields["name"].annotation)[0]: s
        for s in _sections(RunConfig.model_fields["algorithm"].annotation)
    }
    common = set.intersection(*(set(s.model_fields) for s in sections.values()))
    begun = {
        name: {**values, **yaml.safe_load((CONFIGS / "algorithm" / f"{name}.yaml").read_text())} for name in sections
    }
    first = next(iter(sections))
    shown = {n: f for n, f in sections[first].model_fields.items() if n in common}
    lines = ["## algorithm", "", *_table(shown, begun[first], "algorithm."), ""]
    for name, section in sections.items():
        own = {n: f for n, f in section.model_fields.items() if n not in common}
        if own:
            lines += [f"### of algorithm={name}", "", *_table(own, begun[name], "algorithm."), ""]
    return lines


def _data(kind: str) -> dict[str, Any]:
    """The values that a kind of data begins with: those of the group of its name."""
    values: dict[str, Any] = yaml.safe_load((CONFIGS / "data" / f"{kind}.yaml").read_text())
    return values


def _about(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


def _table(fields: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    yield "| key | values | default | |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        if not field.is_required():
            default = _shown(field.get_default())
        else:
            default = _shown(values[name]) if name in values else "none: it must be given"
        yield f"| `{prefix}{name}` | {_cell(_values(field.annotation, field.metadata))} | {default} | {_cell(meaning(field))} |"


def meaning(field: Any) -> str:
    """Returns what a key means: its own description, or that of its type (`rollout/keys.py`)."""
    own = field.description or next((d for m in field.metadata if (d := getattr(m, "description", ""))), "")
    return str(own)


def _shown(value: Any) -> str:
    if value == "???":
        return "none: it must be given"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{_cell(text)}`" if text else "empty"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _values(annotation: Any, metadata: list[Any]) -> str:
    """Says in words which values a key takes."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if annotation in (int, float):
        return ("whole number" if annotation is int else "number") + _bounds(metadata)
    if annotation is bool:
        return "true, false"
    if annotation is str:
        return "text"
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "text, whole number, mapping or null"
    if origin is dict:
        return "mapping"
    if origin in (tuple, list):
        return "list"
    if str(origin) == "typing.Literal":
        return ", ".join(map(str, inside))
    if hasattr(annotation, "__metadata__"):
        return _values(inside[0], [*metadata, *annotation.__metadata__])
    if origin in (Union, UnionType):
        return " or ".join(sorted((_values(kind, metadata) for kind in inside), key=lambda kind: kind == "null"))
    return "see its page"


def _bounds(metadata: list[Any]) -> str:
    found = {}
    for one in metadata:
        for part in (one, *getattr(one, "metadata", ())):
            found |= {name: v for name in ("ge", "gt", "le", "lt") if (v := getattr(part, name, None)) is not None}
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    told = [f"{words[n]} {v:,}" for n, v in found.items() if abs(v) < 2**59]
    return f", {' and '.join(told)}" if told else ""


# messages -------------------------------------------------------------------------------------------------------------


def messages() -> str:
    """Returns the page of every message of an error that ends a command: what the code says, with … for what it fills in."""
    lines = [
        "# Every message",
        "",
        "Whatever ends a command is one line, `samebit: error: …`, which says what to change. These are all of them, as the",
        "code has them: `…` stands for what is filled in. Search this page for a part of your line. What is behind the common",
        "ones, and what helps: [Troubleshooting](troubleshooting.md).",
        "",
    ]
    kinds = {name: code for code, names in CODES.items() for name in names}
    titles = {2: "Exit code 2: bad input, nothing was lost", 1: "Exit code 1: the run had to stop"}
    found = sorted({(code, message, where) for where, name, message in raised() if (code := kinds.get(name))})
    for code, title in titles.items():
        lines += [f"## {title}", "", "| message | where |", "|---|---|"]
        lines += [f"| {_cell(message)} | `{where}` |" for of, message, where in found if of == code]
        lines.append("")
    return "\n".join(lines)


_ERRORS = ("Error", "Lost", "OutOfMemory", "BadRequest")


def raised() -> Iterator[tuple[str, str, str]]:
    """Yields (file, error, message) of everything in the packages that raises with a text, or makes such an error."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            where = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                    continue
                if node.func.id.endswith(_ERRORS) and (text := _text(node.args[0])):
                    yield where, node.func.id, text


def _text(node: ast.expr) -> str:
    """The literal text of an expression, "" where it has none worth showing."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
        text = "".join(parts)
        return text if len(text.replace("…", "").strip()) > 8 else ""
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""
