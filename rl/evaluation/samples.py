"""Keeps every sample of an evaluation in a file of JSON lines."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.run.files import strict, write_atomic
from rl.samples import Group


def write_samples(path: Path, groups: Mapping[str, Sequence[Group]]) -> None:
    """Writes one line a sample: the name of its set, where it has one ("" is none), the problem's id, prompt and answer, and
    the sample's number, text, reward, length in tokens and end. The file is there whole or not at all; one of an earlier
    process of the same run holds the same and is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [({"set": name} if name else {}) | row for name, of_set in groups.items() for row in _rows(of_set)]
    write_atomic(path, "".join(f"{json.dumps(strict(row), ensure_ascii=False)}\n" for row in rows))


def _rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    for group in groups:
        problem = group.problem
        for number, sample in enumerate(group.samples):
            done = sample.completions
            yield {
                "problem": problem.id,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "sample": number,
                "completion": sample.text,
                "reward": sample.reward,
                "rewards": sample.parts,
                "tokens": sum(len(c.token_ids) for c in done),
                "end": done[-1].finish_reason if done else None,
            }
