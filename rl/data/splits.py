"""Finds the two parts of a data set, that which is trained on and that which is held out: in files, in a folder that
`datasets` saved, or on the hub."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rl.data.rows import SUFFIXES, Row, read_rows
from rl.data.section import DatasetSection
from rl.errors import UserError

Splits = Mapping[str, Callable[[], list[Row]]]
"""What reads each split, by its name."""

_HELD_OUT = ("test", "validation")  # what is held out where the user names nothing: the first that there is
_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # a name on the hub
_SAVED = ({"dataset_dict.json"}, {"state.json", "dataset_info.json"})
"""What `save_to_disk` leaves: splits, or one table."""


def read_splits(section: DatasetSection) -> tuple[list[Row], list[Row] | None]:
    """Reads (train, held out); None where nothing is set apart. UserError for what does not exist, cannot be read or is
    empty."""
    path, held = Path(section.path), section.held_out
    with _readable(section.path):
        there, folder = path.exists(), path.is_dir()
        names = {p.name for p in path.iterdir()} if folder else set()
    saved = any(marks <= names for marks in _SAVED)
    files = folder and not saved and any(_is_split(name, section.split) for name in names)
    if section.subset is not None and (files or saved or (there and not folder)):
        raise UserError(f"data.subset={section.subset}: {path} has none, as data sets on the hub may")
    if there and not folder:
        return _one_file(section)
    splits = _files(path, names) if files else _datasets(section, saved, folder)
    train = _read(splits, section.split, "data.split", section.path)
    if held and _is_file(held):
        return train, _held_rows(Path(held), train)
    if held:
        return train, _read(splits, held, "data.held_out", section.path)
    apart = next((name for name in _HELD_OUT if name in splits and name != section.split), None)
    if apart:
        return train, splits[apart]()
    if files:
        raise UserError(
            f"data.path={path} holds no test.jsonl (or {', '.join(SUFFIXES[1:])}): add it, set data.held_out=FILE, or set "
            f"data.path to the one file, of which one problem in eight is held out"
        )
    return train, None


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}") from None


def _one_file(section: DatasetSection) -> tuple[list[Row], list[Row] | None]:
    held = section.held_out
    for key, name in (("split", "" if section.split == "train" else section.split), ("held_out", held)):
        if name and (key == "split" or not _is_file(name)):
            raise UserError(
                f"data.{key}={name}: data.path is one file, which has no splits (data.held_out may be a file)"
            )
    train = read_rows(Path(section.path))
    return train, _held_rows(Path(held), train) if held else None


def _held_rows(path: Path, train: list[Row]) -> list[Row]:
    """Reads the rows of a file of its own, whose name may be that of the one that is trained on."""
    rows, ids = read_rows(path), {row.id for row in train}
    return [replace(row, id=f"held out {row.id}") if row.id in ids else row for row in rows]


def _is_file(held: str) -> bool:
    """Tells whether the user means a file, and not a split."""
    return "/" in held or Path(held).suffix in SUFFIXES or os.path.isfile(held)  # which no name is too long for


def _read(splits: Splits, name: str, key: str, path: str) -> list[Row]:
    if name not in splits:
        raise UserError(f"{key}={name}: {path} has no such split; it has {', '.join(sorted(splits))}")
    return splits[name]()


def _is_split(name: str, split: str) -> bool:
    return Path(name).stem == split and Path(name).suffix in SUFFIXES


def _files(folder: Path, names: set[str]) -> Splits:
    """Takes each file for a split of its name."""
    stems = {Path(name).stem for name in names if Path(name).suffix in SUFFIXES}
    return {stem: partial(_only_file, folder, sorted(n for n in names if _is_split(n, stem))) for stem in stems}


def _only_file(folder: Path, names: list[str]) -> list[Row]:
    if len(names) > 1:
        raise UserError(f"data.path={folder} holds both {names[0]} and {names[1]}: remove one")
    return read_rows(folder / names[0])


def _datasets(section: DatasetSection, saved: bool, folder: bool) -> Splits:
    """Opens what the library `datasets` reads: a folder that it saved or that is as one on the hub, or a name there."""
    import datasets

    if not folder and not _HUB.fullmatch(section.path):
        raise UserError(f"data.path={section.path} does not exist")
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it says each of five times that it tries again
    try:
        with without_bars():
            found = (
                datasets.load_from_disk(section.path) if saved else datasets.load_dataset(section.path, section.subset)
            )
    except Exception as error:  # of several libraries, and of the builder of a format
        raise _unread(section, folder, error) from None
    finally:
        logger.setLevel(level)
    if isinstance(found, datasets.Dataset):
        found = {section.split: found}
    return {str(name): partial(_rows, table, str(name), section.path) for name, table in found.items()}


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keeps the progress bars of `datasets` off stderr."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _unread(section: DatasetSection, folder: bool, error: Exception) -> UserError:
    said = " ".join(str(error).split())[:300]
    if folder:
        return UserError(f"data.path={section.path} holds no {section.split}.jsonl (or another file of rows): {said}")
    if isinstance(error, ConnectionError):
        return UserError(
            f"data.path={section.path} is no file or folder here, and the hub cannot be reached ({said}): download it where "
            f"there is a network (datasets.load_dataset(...).save_to_disk(DIR)), and set data.path=DIR"
        )
    if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
        return UserError(f"data.path={section.path} data.subset={section.subset}: {said}")
    return UserError(f"data.path={section.path} is no file or folder here, and the hub does not give it: {said}")


def _rows(table: Any, split: str, path: str) -> list[Row]:
    """Reads every row as plain Python: what an image or a sound is made of, and not the image."""
    records = table.with_format("arrow")[:].to_pylist() if len(table) else []
    if not records:
        raise UserError(f"data.path={path}: the split {split} is empty")
    return [Row(f"{split}:{i}", f"{path} {split}:{i}", record) for i, record in enumerate(records)]
