"""What docs/metrics.md says of metrics."""

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
_OF_A_ROW = {"step", "phase", "grpo/step", "numerics"}


def documented() -> dict[str, str]:
    """Returns the formula of each metric in a table of the page, by its name, with <k> and <name> where that varies."""
    rows = re.findall(r"^\| (`.*?`) \| (.*?) \| .*\|$", PAGE.read_text().replace("\\|", "¦"), re.MULTILINE)
    found = {name: formula for names, formula in rows for name in re.findall(r"`([^`]+)`", names) if "/" in name}
    return {name: formula.replace("¦", "|") for name, formula in found.items()}


def undocumented(names: Iterable[str]) -> set[str]:
    """Returns those of `names` that the page does not have."""
    patterns = [re.escape(name).replace("<k>", r"\d+").replace("<name>", ".+") for name in documented()]
    return {name for name in names if name not in _OF_A_ROW and not any(re.fullmatch(p, name) for p in patterns)}
