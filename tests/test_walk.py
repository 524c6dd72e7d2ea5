"""The page docs/your_run.md works as it is written: a new user's walk through it, by its own commands."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl.report import read_lines

ROOT = Path(__file__).resolve().parent.parent
BLOCKS: list[str] = re.findall(r"^```\n(.*?)^```$", (ROOT / "docs" / "your_run.md").read_text(), re.M | re.S)
AWAY = ("git clone", "make setup", "hf download", "models/qwen")  # what needs the network, or a model of some size
PARTS = {"runs/tools runs/kept": 1}  # a command that finds a difference
LESS = {"steps=20 warmup.steps=100 eval.problems=100": "steps=2 warmup.steps=5 eval.problems=16"}
"""Of a run: what is less here than on the page."""


def commands(block: str) -> Iterator[str]:
    """The commands of a block, each whole: with the lines that a backslash or a document in it takes."""
    lines, parts, end = iter(block.splitlines()), list[str](), ""
    for line in lines:
        parts.append(line)
        if begun := re.search(r"<<'(\w+)'", line):
            end = begun.group(1)
        if line == end:
            end = ""
        if not end and not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []


def test_the_page_has_all_that_it_promises() -> None:
    told = "\n".join(BLOCKS)
    for what in (
        "rl.data ",
        "reward=mine.py:reward",
        "environment.factory=",
        "rl.api",
        "evaluate",
        "compare",
        "replay",
    ):
        assert what in told, what
    for fewer in LESS:
        assert fewer in told.replace("\\\n    ", ""), f"{fewer}: the page has another line now"


@pytest.mark.slow
def test_a_walk_through_it(tmp_path: Path) -> None:
    """In a folder of its own, where nothing of the clone lies: what the commands read, the page has made."""
    python = Path(sys.executable).parent
    path = {"PATH": f"{python}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    walked = 0
    for command in (command for block in BLOCKS for command in commands(block)):
        if not command.strip() or any(word in command for word in AWAY):
            continue
        for much, less in LESS.items():
            command = command.replace("\\\n    ", "").replace(much, less)
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, timeout=1800
        )
        expected = next((code for words, code in PARTS.items() if words in command), 0)
        assert done.returncode == expected, (shlex.quote(command), done.stdout[-2000:], done.stderr[-2000:])
        assert "Traceback" not in done.stdout + done.stderr, (command, done)
        walked += 1
    assert walked >= 10
    for run in ("mine", "tools", "python", "kept"):
        rows = [row for row in read_lines(tmp_path / "runs" / run / "metrics.jsonl") if "reward/mean" in row]
        assert len(rows) == 2 and not any(row["divergence/tokens_nonzero"] for row in rows), run
    assert (tmp_path / "runs" / "kept" / "report-against-mine.html").is_file()
