"""Prints rows of figures so that none is lost: labels fold, figures do not, and where a line is too short they are stacked."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 140
"""Columns of a line where no terminal says how many it has."""
_LABEL_WIDTH = 12  # columns that a label keeps, at least

Cell = str | tuple[str, ...]
"""A label, a figure, or figures that belong together: side by side, or one below the other where the line is short."""


def console(file: TextIO | None = None) -> Console:
    """Returns a console as wide as the terminal or as COLUMNS says; LOG_WIDTH in a log file."""
    known = (file or sys.stdout).isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(file=file, width=None if known else LOG_WIDTH, highlight=False)


def show(
    out: Console, labels: Sequence[str], figures: Sequence[str], rows: Iterable[Sequence[Cell]], title: str = ""
) -> None:
    """Prints a table whose first columns are `labels`. Where it would be wider than `out`, its labels become one column, heads
    and cells of figures are stacked; where that is too wide as well, lines are longer than `out` is wide."""
    rows = list(rows)
    table = _table(labels, figures, [[_joined(cell, " ") for cell in row] for row in rows], title)
    if _width(out, table) > out.width:
        n = len(labels)
        stacked = [
            [", ".join(_joined(c, " ") for c in row[:n] if c), *(_joined(c, "\n") for c in row[n:])] for row in rows
        ]
        table = _table([", ".join(filter(None, labels))], [f.replace(" ", "\n") for f in figures], stacked, title)
    width = out.width
    out.width = max(width, _width(out, table))
    out.print(table)
    out.width = width


def _table(labels: Sequence[str], figures: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in labels:
        table.add_column(name, overflow="fold", min_width=_LABEL_WIDTH)
    for i, name in enumerate(figures, len(labels)):
        table.add_column(name, justify="right", no_wrap=True, min_width=_whole([name, *(row[i] for row in rows)]))
    for row in rows:
        table.add_row(*row)
    return table


def _whole(texts: Iterable[str]) -> int:
    """Returns the columns of the longest line: rich takes the longest word for what a column needs."""
    return max(Text.from_markup(line).cell_len for text in texts for line in text.split("\n"))


def _joined(cell: Cell, separator: str) -> str:
    return cell if isinstance(cell, str) else separator.join(part for part in cell if part)


def _width(out: Console, table: Table) -> int:
    """Returns how many columns the table needs: labels folded, figures whole."""
    return out.measure(table, options=out.options.update(width=1000)).minimum
