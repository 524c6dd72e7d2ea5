"""Reads the rows of one file: JSON lines, JSON, CSV or parquet."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_LONGEST = 2**31 - 1  # characters of one value of a CSV file


@dataclass(frozen=True)
class Row:
    """Holds one row with all its fields, as the data has it."""

    id: str  # unique in its data set: "train.jsonl:3"
    at: str  # where a user finds it: "DIR/train.jsonl:3"
    record: Any  # a dict, unless the file is wrong


def read_rows(path: Path) -> list[Row]:
    """Reads all rows of a file; UserError where it has none, or names the first line that cannot be read."""
    try:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if not path.is_file():
            raise UserError(
                f"{path} is no regular file: it is read more than once, which a pipe or a device does not allow"
            )
        rows = [Row(f"{path.name}:{number}", f"{path}:{number}", record) for number, record in _numbered(path)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def _numbered(path: Path) -> Iterator[tuple[int, Any]]:
    """Chooses by the suffix; a file with another one is read as JSON lines."""
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix in (".csv", ".tsv"):
        return _csv(path, "," if path.suffix == ".csv" else "\t")
    content = path.read_bytes()
    if path.suffix == ".json" and content.lstrip()[:1] == b"[":
        return _json(path, content)
    return _json_lines(path, content)


def _json_lines(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.split(b"\n"), 1):  # and nothing else ends a line: a text may hold U+2028
        if line.strip():
            yield number, _parsed(path, number, line)


def _json(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    yield from enumerate(_parsed(path, 0, content), 1)


def _parsed(path: Path, line: int, content: bytes) -> Any:
    """Reads JSON; `line`: its number, or 0 for a whole file."""
    try:
        return json.loads(content)
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}:{line or 1}: not JSON in UTF-8: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line or error.lineno}: not a JSON object: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}:{line or 1}: cannot be read: {error}") from None


def _csv(path: Path, separator: str) -> Iterator[tuple[int, Any]]:
    """Every value is the text that stands there: a type that is guessed would make 7 of 007, and nothing of NA."""
    csv.field_size_limit(_LONGEST)
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=separator, strict=True)
        try:
            names = next(lines, [])
            if len(set(names)) < len(names):
                raise UserError(f"{path}:1: two columns have one name: {', '.join(names)}")
            for values in lines:
                if len(values) == len(names):
                    yield lines.line_num, dict(zip(names, values, strict=True))
                elif values:  # a blank line has none
                    raise UserError(
                        f"{path}:{lines.line_num}: {len(values)} values, and the first line names {len(names)} columns"
                    )
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{lines.line_num + 1}: not CSV in UTF-8: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from None
    yield from enumerate(rows, 1)
