"""Reads question-answer files: JSON lines and parquet."""

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rl.config import JsonlSection
from rl.data.problem import HELD_OUT
from rl.errors import UserError

Record = dict[str, Any]

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot


def read_files(config: JsonlSection) -> tuple[list[Record], list[Record]]:
    """Reads (train, held out): train.* and test.* of a folder; of one file, one record in eight is held out. Each record holds
    its question, its answer and where it stands. UserError names the first bad line."""
    path = Path(config.path)
    try:
        if not path.exists():
            raise UserError(f"data.path={path} does not exist")
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}") from None
    if not path.is_dir():
        records = _read(path, config)
        held = [r for r in records if zlib.crc32(r[config.question].encode()) % HELD_OUT == 0]
        return [r for r in records if zlib.crc32(r[config.question].encode()) % HELD_OUT], held
    return _read(_split(path, "train"), config), _read(_split(path, "test"), config)


def _split(folder: Path, name: str) -> Path:
    try:
        files = sorted(p for p in folder.glob(f"{name}.*") if p.suffix in (".jsonl", ".parquet"))
    except OSError as error:
        raise UserError(f"data.path={folder} cannot be read: {error.strerror}") from None
    if not files:
        raise UserError(f"data.path={folder} holds no {name}.jsonl or {name}.parquet")
    if len(files) > 1:
        raise UserError(f"data.path={folder} holds both {files[0].name} and {files[1].name}: remove one")
    return files[0]


def _read(path: Path, config: JsonlSection) -> list[Record]:
    """Reads the records of one file, each with where it stands; UserError names the first bad line (or row)."""
    import datasets

    if not path.is_file():
        raise UserError(
            f"{path} is no regular file: it is read more than once, which a pipe or a device does not allow"
        )
    fields = (config.question, config.answer)
    rows = _parquet_rows(path, fields) if path.suffix == ".parquet" else _jsonl_rows(path)
    records = []
    for number, row in rows:
        _check(f"{path}:{number}", row, config)
        records.append({**{f: row[f] for f in fields}, "where": f"{path.name}:{number}"})
    if not records:
        raise UserError(f"{path} is empty")
    return list(datasets.Dataset.from_list(records))


def _check(where: str, row: Any, config: JsonlSection) -> None:
    for field in (config.question, config.answer):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UserError(f"{where}: no text field {field!r}")
        if _SURROGATE.search(row[field]):
            raise UserError(
                f"{where}: field {field!r} holds half a surrogate pair (\\ud800 to \\udfff), which is no text"
            )
    _, marker, result = row[config.answer].rpartition(config.marker)
    if not marker:
        raise UserError(f"{where}: the answer has no {config.marker!r} before its result")
    if not result.strip():
        raise UserError(f"{where}: the answer has no result after its {config.marker!r}")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")  # and nothing else ends a line: a text may hold U+2028
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON in UTF-8: {error}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not a JSON object: {error.msg}") from None
        except ValueError as error:  # a number of thousands of digits
            raise UserError(f"{path}:{number}: cannot be read: {error}") from None


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
        if missing := sorted(set(fields) - set(columns)):
            raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(columns)}")
        rows = pyarrow.parquet.read_table(path, columns=list(fields)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable parquet file: {error}") from None
    yield from enumerate(rows, 1)
