"""Makes problems of rows that hold a question and an answer, judged by math-verify."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rl.data import tokenizer as tokenizers
from rl.data.chat import Chat, named_template
from rl.data.fields import (
    Message,
    Question,
    checked,
    content_text,
    find_fields,
    has,
    number_at,
    plain_text,
    text_of,
    without_nulls,
)
from rl.data.problem import Judge, Problem, Source, is_held_out
from rl.data.rows import Row
from rl.data.section import DatasetSection
from rl.data.splits import read_splits
from rl.data.template import check_apart, fill
from rl.errors import UserError
from rl.run.screen import Waiting
from rollout.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

_CHARACTERS = 32
"""Of one token of a prompt, at the most: a prompt with more a token is none that a tokenizer is made for."""
PROMPT_TOKENS = "prompt_tokens"
"""What data.curriculum calls the length of a prompt."""


@dataclass(frozen=True)
class Asked:
    """Holds a row with what was found in it."""

    row: Row
    question: Question
    text: str  # of the question, whoever says it
    solution: str  # the whole answer; "" where there is none
    result: str  # what a completion is judged by
    tools: list[Any]


class Questions:
    """Holds the rows of a data set, all of them checked, before there is a tokenizer."""

    def __init__(
        self,
        section: DatasetSection,
        own_reward: bool,
        supervised: bool,
        console: "Console | None",
        trained: bool = True,
    ) -> None:
        """`own_reward`: what judges reads no answer; `supervised`: the answers are taught; `trained`: nobody trains on an
        evaluation set, and where nothing of it is set apart, all of it is held out. UserError names the first bad row."""
        self._section, self._console = section, console
        self.template, self._as_chat = named_template(section), as_chat(section)
        self._needed = supervised or not own_reward or section.marker is not None
        with Waiting(console, f"reading {section.path}"):
            rows, apart = read_splits(section)
            self.fields = find_fields(section, rows)
            self._check_answers(rows[0])
            asked = [self._asked(row) for row in rows]
            self.held_out = [self._asked(row) for row in apart or ()]
        self._check_read(rows[0], [*asked, *self.held_out])
        self.train = asked
        if apart is None:
            self.held_out = [a for a in asked if not trained or is_held_out(a.text)]
            self.train = [a for a in asked if trained and not is_held_out(a.text)]

    def _check_answers(self, first: Row) -> None:
        fields = self.fields
        if self._needed and not fields.answer and fields.answer_of(first) is None:
            known = ", ".join(map(str, first.record))
            raise UserError(
                f"{first.at}: no field is known as the answer: set data.answer=FIELD (the fields are {known}), or "
                f"reward=module:function and warmup.steps=0"
            )

    def _check_read(self, first: Row, asked: list[Asked]) -> None:
        """Refuses keys that no row makes use of."""
        section = self._section
        if section.answer is not None and not any(a.solution for a in asked):
            raise UserError(f"{first.at}: no text field {section.answer!r}{has(first)}")
        if section.tools is not None and not any(a.tools for a in asked):
            raise UserError(f"data.tools={section.tools}: no row has such a field with tools in it")
        texts = not self._as_chat and all(isinstance(a.question, str) for a in asked)
        if texts and (section.chat_template is not None or section.template_args):
            key = "chat_template" if section.chat_template is not None else "template_args"
            raise UserError(f"data.{key} is set, and the questions are texts: set data.chat=true to make them messages")

    def _asked(self, row: Row) -> Asked:
        question = self.fields.question_of(row)
        solution = self._solution(row)
        result = solution and self._result(solution, row)
        if self.fields.answer and isinstance(last := self.fields.last_of(row), str):
            solution = checked(last, self.fields.question, row)  # taught whole, and judged by the answer
        is_chat = self._as_chat or not isinstance(question, str)
        return Asked(row, question, text_of(question), solution, result, self.fields.tools_of(row) if is_chat else [])

    def _solution(self, row: Row) -> str:
        """Returns the answer as its text, which before a marker must be one already."""
        value, field = self.fields.answer_of(row), self.fields.answer or self.fields.question
        text = value if isinstance(value, str) else None if self._section.marker is not None else plain_text(value)
        if text is None and not self._needed:
            return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
        if text is None:
            raise _no_answer(row, value, field, self._section.marker)
        if self._needed and not text.strip():
            raise UserError(f"{row.at}: the answer is empty (field {field!r})")
        return checked(text, field, row)

    def _result(self, solution: str, row: Row) -> str:
        """Returns what of the answer is judged: what follows the marker, or stands in its last box, or all of it."""
        from rl.rewards.answer import boxed, without_separators

        if self._section.marker is None:
            return without_separators((boxed(solution) or solution).strip())
        _, found, result = solution.rpartition(self._section.marker)
        if not found:
            raise UserError(f"{row.at}: the answer has no {self._section.marker!r} before its result")
        if not result.strip():
            raise UserError(f"{row.at}: the answer has no result after its {self._section.marker!r}")
        return without_separators(result.strip())

    def texts(self) -> Iterator[str]:
        """Yields the texts that training may see: not of rows that are surely too long."""
        most = _CHARACTERS * self._section.max_prompt_tokens
        for asked in [a for a in self.train if len(a.text) <= most] or self.train:
            yield asked.text
            yield asked.solution

    def tokenizer(self) -> Tokenizer:
        """Makes one from the texts."""
        with Waiting(self._console, f"making a tokenizer from {len(self.train):,} problems"):
            return tokenizers.byte_level_bpe(self.texts(), self._section.vocab_size, self.template)

    def source(self, tokenizer: Tokenizer, made: bool) -> Source:
        """Makes the problems; `made`: the tokenizer was made from their texts."""
        make = _Maker(self._section, tokenizer, made)
        train, held_out = self._problems(make, self.train), self._problems(make, self.held_out)
        left = len(self.train) + len(self.held_out) - len(train) - len(held_out)
        texts = {a.row.id: a.text for a in (*self.train, *self.held_out)}
        asked = ((p.id, texts[p.id], p.prompt, p.answer) for p in (*train, *held_out))
        warnings = tuple(filter(None, (check_apart(self._section.prompt, asked), seen(train, held_out))))
        judge = math_judge(self._section.marker)
        about = (self.fields.found,) if self.fields.found else ()
        rows, ranks = _checksum([*train, *held_out]), _ranks(self._section.curriculum, train)
        return Source(train, held_out, judge, tokenizer, left, "math-verify", warnings, rows, about, ranks=ranks)

    def _problems(self, make: "_Maker", asked: list[Asked]) -> list[Problem]:
        with Waiting(self._console, "reading prompts as tokens", len(asked)) as waiting:
            made = []
            for waiting.done, one in enumerate(asked):
                made.append(make(one))
        return [p for p in made if p]


class _Maker:
    """Makes a problem of what was found in a row."""

    def __init__(self, section: DatasetSection, tokenizer: Tokenizer, made: bool) -> None:
        self._section, self._tokenizer = section, tokenizer
        # A token of a made tokenizer stands for its own characters: a prompt of more is too long, however it is cut
        self._most = section.max_prompt_tokens * max(map(len, tokenizer.backend.get_vocab())) if made else math.inf

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self._section, self._tokenizer)

    def __call__(self, asked: Asked) -> Problem | None:
        """Returns None where the prompt is too long."""
        messages = self._messages(asked)
        if messages is None:
            prompt = self._filled(asked, asked.text)
        else:
            prompt = self._chat(messages, asked.tools, asked.row.at)
        if len(prompt) > self._most:
            return None
        ids = self._tokenizer.encode(prompt, add_special_tokens=messages is None)  # a chat template writes them itself
        if len(ids) > self._section.max_prompt_tokens:
            return None
        return Problem(asked.row.id, prompt, ids, asked.result, asked.solution, asked.row.record, messages)

    def _messages(self, asked: Asked) -> list[Message] | None:
        """Returns the conversation of a prompt, None where it is a text. The user's template is that of the last message."""
        if isinstance(asked.question, str):
            if not as_chat(self._section):
                return None
            messages = [{"role": "user", "content": self._filled(asked, asked.text)}]
        else:
            messages = list(asked.question)
            if self._section.prompt != "{question}":
                content = self._filled(asked, content_text(messages[-1]["content"]))
                messages[-1] = messages[-1] | {"content": content}
        if self._section.system is None:
            return messages
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        return [{"role": "system", "content": self._section.system}, *rest]

    def _filled(self, asked: Asked, question: str) -> str:
        others = {name: value for name, value in asked.row.record.items() if name != "question"}
        return fill(self._section.prompt, question=question, **others)


def as_chat(section: DatasetSection) -> bool:
    """Tells whether a question that is a text is a user's message."""
    return section.chat or section.system is not None or section.tools is not None


def math_judge(marker: str | None) -> Judge:
    """Returns a judge: 1 where the result after the last marker (the whole text, if there is none) equals the answer, by
    math-verify."""
    from rl.rewards.answer import same_answer

    def judge(problem: Problem, text: str) -> float:
        return float(same_answer(text.rpartition(marker)[2] if marker else text, problem.answer))

    return judge


def _no_answer(row: Row, value: Any, field: str, marker: str | None) -> UserError:
    if isinstance(value, list | dict) and value and marker is None:
        part = "0" if isinstance(value, list) else next(iter(value))
        return UserError(
            f"{row.at}: field {field!r} is a {type(value).__name__} of {len(value)}, and an answer is one text or number: set "
            f"data.answer to a part of it ({field}.{part}), or reward=module:function and warmup.steps=0"
        )
    return UserError(f"{row.at}: no text field {field!r}{has(row)}")


def _ranks(field: str | None, problems: list[Problem]) -> tuple[float, ...]:
    """Returns how early each problem comes, as the user says: by a field, or by the tokens of its prompt."""
    if field is None:
        return ()
    if field == PROMPT_TOKENS:
        return tuple(float(len(problem.prompt_ids)) for problem in problems)
    ranks = [number_at(problem.record, field) for problem in problems]
    if None in ranks:
        where = problems[ranks.index(None)].id
        raise UserError(f"{where}: data.curriculum={field}: no number is there (a field, or {PROMPT_TOKENS})")
    return tuple(rank for rank in ranks if rank is not None)


def _checksum(problems: list[Problem]) -> str:
    """Returns the SHA-256 of the rows, which a reward may read whole."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps(without_nulls(problem.record), default=str, sort_keys=True).encode())
    return digest.hexdigest()


def seen(train: list[Problem], held_out: list[Problem]) -> str:
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
