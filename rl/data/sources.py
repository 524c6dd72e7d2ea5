"""The sources: procedural tasks of reasoning-gym, and question-answer files."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.config import JsonlSection, ReasoningGymSection, RunConfig
from rl.data import tokenizer as tokenizers
from rl.data.problem import Problem, Source
from rl.errors import UserError
from rollout.tokenizer import Tokenizer

_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot
_HELD_OUT = 8  # one prompt in eight, by its checksum, is never trained on


def open_source(config: RunConfig) -> Source:
    """Raises UserError for a task that does not exist, a pattern that keeps nothing, or a file with a bad line."""
    own = tokenizers.from_model(config.model.path) if config.model.path else None
    if isinstance(config.data, ReasoningGymSection):
        source = _reasoning_gym(config.data, config.seed, own)
    else:
        source = _jsonl(config.data, own)
    for problem in (*source.train, *source.held_out):
        if not problem.prompt or not problem.prompt_ids:  # ids there may be: a begin of text
            raise UserError(f"the prompt of problem {problem.id!r} is empty: data.prompt={config.data.prompt!r}")
    if not source.train or not source.held_out:
        hint = "give more problems" if not source.left_out else "raise data.max_prompt_tokens"
        raise UserError(
            f"the data leaves {len(source.train)} problems to train on and {len(source.held_out)} held out"
            f"{left_out(source)}: {hint}"
        )
    return source


def left_out(source: Source) -> str:
    """What to say of the problems whose prompts are too long."""
    return f", {source.left_out} left out for prompts above data.max_prompt_tokens" if source.left_out else ""


def _reasoning_gym(config: ReasoningGymSection, seed: int, own: Tokenizer | None) -> Source:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if config.task not in DATASETS:
        raise UserError(
            f"data.task={config.task!r} is no reasoning-gym dataset; some are: {', '.join(sorted(DATASETS)[:8])}"
        )
    try:
        dataset = reasoning_gym.create_dataset(config.task, size=2**31, seed=seed, **config.args)
        pattern = re.compile(config.pattern)
    except (AssertionError, TypeError) as error:
        given = ", ".join(config.args)
        raise UserError(f"data.args of {config.task}: {error} (given: {given}; ~data.args.NAME removes one)") from None
    except re.error as error:
        raise UserError(f"data.pattern: {error}") from None

    found: list[tuple[str, Mapping[str, Any]]] = []
    for i in range(1000 * config.problems):
        entry = dataset[i]
        if match := pattern.fullmatch(entry["question"]):
            found.append((_fill(config.prompt, *match.groups()), entry))
            if len(found) == config.problems:
                break
        elif i >= 10_000 and not found:
            raise UserError(f"data.pattern matches none of 10000 questions such as {entry['question']!r}")
    tokenizer = own or tokenizers.of_characters(text for prompt, e in found for text in (prompt, e["answer"]))
    unique = {prompt: entry for prompt, entry in reversed(found)}  # the first draw of a prompt stands for it

    def problem(prompt: str) -> Problem:
        entry = unique[prompt]
        ids = tokenizer.encode(prompt)
        return Problem(prompt, prompt, ids, entry["answer"], entry["answer"], entry)

    def judge(problem: Problem, text: str) -> float:
        return float(dataset.score_answer(answer=text, entry=problem.record))

    # The held-out prompts are a function of the prompt alone; what is drawn more often is trained on more often.
    train = [problem(prompt) for prompt, _ in found if zlib.crc32(prompt.encode()) % _HELD_OUT]
    held_out = [problem(prompt) for prompt in sorted(unique) if zlib.crc32(prompt.encode()) % _HELD_OUT == 0]
    return Source(train, held_out, judge, tokenizer)


def _jsonl(config: JsonlSection, own: Tokenizer | None) -> Source:
    from rl.data.answer import same_answer

    train_records, held_records = _read_files(config)
    tokenizer = own or tokenizers.byte_level_bpe(
        (text for r in train_records for text in (r[config.question], r[config.answer])), config.vocab_size
    )

    def problem(record: Mapping[str, Any]) -> Problem:
        prompt = _fill(config.prompt, question=record[config.question])
        answer = record[config.answer].rpartition(config.marker)[2].strip().replace(",", "")
        ids = tokenizer.encode(prompt)
        return Problem(record["where"], prompt, ids, answer, record[config.answer], record)

    def judge(problem: Problem, text: str) -> float:
        """1 where the result after the last marker (the whole text, if there is none) equals the answer, by math-verify."""
        return float(same_answer(text.rpartition(config.marker)[2], problem.answer))

    def short(records: list[dict[str, Any]]) -> list[Problem]:
        return [p for p in map(problem, records) if len(p.prompt_ids) <= config.max_prompt_tokens]

    train, held_out = short(train_records), short(held_records)
    left = len(train_records) + len(held_records) - len(train) - len(held_out)
    return Source(train, held_out, judge, tokenizer, left)


def _fill(template: str, *groups: str, **fields: str) -> str:
    try:
        return template.format(*groups, **fields)
    except (LookupError, ValueError, AttributeError, TypeError) as error:  # it may ask for an attribute, or an item
        known = ", ".join(f"{{{name}}}" for name in (*range(len(groups)), *fields))
        raise UserError(f"data.prompt={template!r}: {type(error).__name__} {error}; it may use {known}") from None


def _read_files(config: JsonlSection) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, held out): train.* and test.* of a folder; of one file, one record in eight is held out."""
    path = Path(config.path)
    try:
        if not path.exists():
            raise UserError(f"data.path={path} does not exist")
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error.strerror}") from None
    if path.is_file():
        records = _read(path, config)
        held = [r for r in records if zlib.crc32(r[config.question].encode()) % _HELD_OUT == 0]
        return [r for r in records if zlib.crc32(r[config.question].encode()) % _HELD_OUT], held
    found = {}
    for split in ("train", "test"):
        files = sorted(p for p in path.glob(f"{split}.*") if p.suffix in (".jsonl", ".parquet"))
        if not files:
            raise UserError(f"data.path={path} holds no {split}.jsonl or {split}.parquet")
        found[split] = _read(files[0], config)
    return found["train"], found["test"]


def _read(path: Path, config: JsonlSection) -> list[dict[str, Any]]:
    """The records of one file, each with where it stands; UserError names the first bad line (or row)."""
    import datasets

    fields = (config.question, config.answer)
    rows = _parquet_rows(path, fields) if path.suffix == ".parquet" else _jsonl_rows(path)
    records = []
    for number, row in rows:
        where = f"{path}:{number}"
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise UserError(f"{where}: no text field {field!r}")
            if _SURROGATE.search(row[field]):
                raise UserError(
                    f"{where}: field {field!r} holds half a surrogate pair (\\ud800 to \\udfff), which is no text"
                )
        if not row[config.answer].rpartition(config.marker)[1]:
            raise UserError(f"{where}: the answer has no {config.marker!r} before its result")
        if not row[config.answer].rpartition(config.marker)[2].strip():
            raise UserError(f"{where}: the answer has no result after its {config.marker!r}")
        records.append({**{f: row[f] for f in fields}, "where": f"{path.name}:{number}"})
    if not records:
        raise UserError(f"{path} is empty")
    return list(datasets.Dataset.from_list(records))


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
