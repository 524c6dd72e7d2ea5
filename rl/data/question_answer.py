"""Makes problems of question-answer files, judged by math-verify."""

import math
from typing import TYPE_CHECKING

from rl.config import JsonlSection
from rl.data import tokenizer as tokenizers
from rl.data.files import Record, read_files
from rl.data.problem import Problem, Source
from rl.data.template import check_apart, fill
from rl.errors import UserError
from rl.run.screen import Waiting
from rollout.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

_CHARACTERS = (
    32  # of one token of a prompt, at the most: a prompt with more a token is none that a tokenizer is made for
)


def file_source(config: JsonlSection, own: Tokenizer | None, console: "Console | None" = None) -> Source:
    """Reads the problems of the files of `config`; UserError names the first bad line."""
    from rl.rewards.answer import same_answer, without_separators

    with Waiting(console, f"reading {config.path}"):
        train_records, held_records = read_files(config)
    tokenizer = own or _tokenizer(train_records, config, console)
    # A token of a made tokenizer stands for its own characters: a prompt of more is too long, however it is cut
    most = math.inf if own else config.max_prompt_tokens * max(map(len, tokenizer.backend.get_vocab()))

    def problem(record: Record) -> Problem | None:
        prompt = fill(config.prompt, question=record[config.question])
        if len(prompt) > most:
            return None
        answer = without_separators(record[config.answer].rpartition(config.marker)[2].strip())
        ids = tokenizer.encode(prompt)
        if len(ids) > config.max_prompt_tokens:
            return None
        return Problem(record["where"], prompt, ids, answer, record[config.answer], record)

    def judge(problem: Problem, text: str) -> float:
        """1 where the result after the last marker (the whole text, if there is none) equals the answer, by math-verify."""
        return float(same_answer(text.rpartition(config.marker)[2], problem.answer))

    def problems(records: list[Record]) -> list[Problem]:
        with Waiting(console, "reading prompts as tokens", len(records)) as waiting:
            made = []
            for waiting.done, record in enumerate(records):
                made.append(problem(record))
        return [p for p in made if p]

    train, held_out = problems(train_records), problems(held_records)
    left = len(train_records) + len(held_records) - len(train) - len(held_out)
    asked = ((p.id, p.record[config.question], p.prompt, p.answer) for p in (*train, *held_out))
    warnings = tuple(filter(None, (check_apart(config.prompt, asked), _seen(train, held_out))))
    return Source(train, held_out, judge, tokenizer, left, "math-verify", warnings)


def _tokenizer(records: list[Record], config: JsonlSection, console: "Console | None") -> Tokenizer:
    """Makes one from the texts that training may see: not from rows that are surely too long."""
    most = _CHARACTERS * config.max_prompt_tokens
    rows = [r for r in records if len(r[config.question]) <= most] or records
    texts = (text for r in rows for text in (r[config.question], r[config.answer]))
    with Waiting(console, f"making a tokenizer from {len(rows):,} problems"):
        return tokenizers.byte_level_bpe(texts, config.vocab_size)


def _seen(train: list[Problem], held_out: list[Problem]) -> str:
    """Returns what to warn of where problems are held out that training sees; UserError where that is all of them."""
    there = {p.prompt: p.id for p in train}
    both = [p for p in held_out if p.prompt in there]
    if not both:
        return ""
    first = f"first: {both[0].id}, which is {there[both[0].prompt]}"
    if len(both) == len(held_out):
        raise UserError(
            f"all {len(both)} held-out problems are trained on too ({first}): give others, or one file, of which one problem "
            f"in eight is held out"
        )
    return f"{len(both)} of {len(held_out)} held-out problems are trained on too, {first}"
