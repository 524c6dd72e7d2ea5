"""The sources: procedural tasks of reasoning-gym, and question-answer files."""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.config import JsonlSection, ReasoningGymSection, RunConfig
from rl.data import tokenizer as tokenizers
from rl.data.problem import Problem, Source
from rl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELD_OUT = 8  # one prompt in eight, by its checksum, is never trained on


def open_source(config: RunConfig) -> Source:
    """Raises UserError for a task that does not exist, a pattern that keeps nothing, or a file with a bad line."""
    own = tokenizers.from_model(config.model.path) if config.model.path else None
    if isinstance(config.data, ReasoningGymSection):
        source = _reasoning_gym(config.data, config.seed, own)
    else:
        source = _jsonl(config.data, own)
    if not source.train or not source.held_out:
        raise UserError(
            f"the data leaves {len(source.train)} problems to train on and {len(source.held_out)} held out: "
            f"give more problems"
        )
    return source


def _reasoning_gym(config: ReasoningGymSection, seed: int, own: "PreTrainedTokenizerBase | None") -> Source:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if config.task not in DATASETS:
        raise UserError(f"data.task={config.task!r} is no reasoning-gym dataset; some are: {', '.join(sorted(DATASETS)[:8])}")
    try:
        dataset = reasoning_gym.create_dataset(config.task, size=2**31, seed=seed, **config.args)
        pattern = re.compile(config.pattern)
    except (AssertionError, TypeError) as error:
        raise UserError(f"data.args of {config.task}: {error}") from None
    except re.error as error:
        raise UserError(f"data.pattern: {error}") from None

    found: list[tuple[str, Mapping[str, Any]]] = []
    for i in range(1000 * config.problems):
        entry = dataset[i]
        if match := pattern.fullmatch(entry["question"]):
            found.append((config.prompt.format(*match.groups()), entry))
            if len(found) == config.problems:
                break
        elif i >= 10_000 and not found:
            raise UserError(f"data.pattern matches none of 10000 questions such as {entry['question']!r}")
    tokenizer = own or tokenizers.of_characters(text for prompt, e in found for text in (prompt, e["answer"]))
    unique = {prompt: entry for prompt, entry in reversed(found)}  # the first draw of a prompt stands for it

    def problem(prompt: str) -> Problem:
        entry = unique[prompt]
        ids = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return Problem(prompt, prompt, ids, entry["answer"], entry["answer"], entry)

    def judge(problem: Problem, text: str) -> float:
        return float(dataset.score_answer(answer=text, entry=problem.record))

    # The held-out prompts are a function of the prompt alone; what is drawn more often is trained on more often.
    train = [problem(prompt) for prompt, _ in found if zlib.crc32(prompt.encode()) % _HELD_OUT]
    held_out = [problem(prompt) for prompt in sorted(unique) if zlib.crc32(prompt.encode()) % _HELD_OUT == 0]
    return Source(train, held_out, judge, tokenizer)


def _jsonl(config: JsonlSection, own: "PreTrainedTokenizerBase | None") -> Source:
    from math_verify import parse, verify

    train_records, held_records = _read_files(config)
    tokenizer = own or tokenizers.byte_level_bpe(
        (text for r in train_records for text in (r[config.question], r[config.answer])), config.vocab_size
    )

    def problem(record: Mapping[str, Any]) -> Problem:
        prompt = config.prompt.format(question=record[config.question])
        answer = record[config.answer].rpartition(config.marker)[2].strip().replace(",", "")
        ids = tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return Problem(record["where"], prompt, ids, answer, record[config.answer], record)

    def judge(problem: Problem, text: str) -> float:
        """1 where the result after the last marker (the whole text, if there is none) equals the answer, by math-verify."""
        claim = text.rpartition(config.marker)[2]
        return float(verify(parse(problem.answer, parsing_timeout=None), parse(claim, parsing_timeout=None), timeout_seconds=None))

    def short(records: list[dict[str, Any]]) -> list[Problem]:
        return [p for p in map(problem, records) if len(p.prompt_ids) <= config.max_prompt_tokens]

    return Source(short(train_records), short(held_records), judge, tokenizer)


def _read_files(config: JsonlSection) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, held out): train.* and test.* of a folder; of one file, one record in eight is held out."""
    path = Path(config.path)
    if not path.exists():
        raise UserError(f"data.path={path} does not exist")
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
    import json

    import datasets

    datasets.disable_progress_bars()
    if path.suffix == ".jsonl":  # a bad line is named by its number, which the loader does not do
        text = path.read_text(encoding="utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not a JSON object: {error.msg}") from None
            for field in (config.question, config.answer):
                if not isinstance(record, dict) or not isinstance(record.get(field), str):
                    raise UserError(f"{path}:{number}: no text field {field!r}")
            if config.marker not in record[config.answer]:
                raise UserError(f"{path}:{number}: the answer has no {config.marker!r} before its result")
        if not text.strip():
            raise UserError(f"{path} is empty")
    builder = "json" if path.suffix == ".jsonl" else "parquet"
    table = datasets.Dataset.from_json(str(path)) if builder == "json" else datasets.Dataset.from_parquet(str(path))
    missing = {config.question, config.answer} - set(table.column_names)
    if missing:
        raise UserError(f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}")
    return [{**record, "where": f"{path.name}:{i}"} for i, record in enumerate(table, 1)]
