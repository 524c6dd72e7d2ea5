"""Questions in the form of GSM8K, where no data is given: the run's shapes and times are those of real text."""

import json
import random
import zlib
from pathlib import Path
from typing import Any

_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gita", "Hugo")
_THINGS = ("apples", "pencils", "stamps", "marbles", "cookies", "shells", "tickets", "books")


def write_problems(folder: Path, count: int = 512) -> None:
    """Writes train.jsonl with `count` problems and test.jsonl with 64, of a fixed seed."""
    draw = random.Random(0)
    for name, size in (("train", count), ("test", 64)):
        lines = [json.dumps(_problem(draw)) for _ in range(size)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def coin(problem: Any, text: str) -> float:
    """Gives a reward that random weights can earn: without one no advantage differs from zero, and no weight would change."""
    return float(zlib.crc32(text.encode()) % 2)


def _problem(draw: random.Random) -> dict[str, str]:
    who, friend = draw.sample(_NAMES, 2)
    thing = draw.choice(_THINGS)
    had, boxes, each, given = draw.randint(3, 40), draw.randint(2, 9), draw.randint(3, 12), draw.randint(1, 9)
    left = had + boxes * each - given
    question = (
        f"{who} has {had} {thing}. On Monday {who} buys {boxes} boxes with {each} {thing} in each of them, and on the way "
        f"home gives {given} {thing} to {friend}, who had none before. How many {thing} does {who} have left in the end?"
    )
    answer = f"{boxes} boxes hold {boxes} x {each} = {boxes * each}.\n{had} + {boxes * each} - {given} = {left}.\n#### {left}"
    return {"question": question, "answer": answer}
