"""Rows as markdown: one table a part, its columns the figures."""

from collections.abc import Sequence

from recipes.multi_gpu.parts import PARTS, Row


def markdown(rows: Sequence[Row], facts: dict[str, str]) -> str:
    """Writes the rows as a page: its facts, then a table a part."""
    out = ["# The recipe on several GPUs", ""]
    out += [f"`{facts['command']}` wrote this page; a row is one thing that was run. Nothing here was typed in.", ""]
    out += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if name != "command"), ""]
    failed = [row for row in rows if not row.ok]
    out += [f"{len(rows) - len(failed)} of {len(rows)} rows hold." + _named(failed), ""]
    for part, work in PARTS.items():
        mine = [row for row in rows if row.part == part]
        if mine:
            out += [f"## {part}", "", " ".join((work.__doc__ or "").split()), "", *_table(mine), ""]
            out += ["```", *dict.fromkeys(row.command for row in mine), "```", ""]
    return "\n".join(out)


def _named(failed: Sequence[Row]) -> str:
    return "".join(f" **{row.part}, {row.case}: {row.note}**" for row in failed)


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row.figures))
    lines = [_line(["", "holds", *columns, "s"]), _line(["---"] * (len(columns) + 3))]
    for row in rows:
        cells = [str(row.figures.get(name, "")).replace("|", "\\|") for name in columns]
        lines.append(_line([row.case, "yes" if row.ok else "**no**", *cells, f"{row.seconds:.0f}"]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
