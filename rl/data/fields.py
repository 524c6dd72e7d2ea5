"""Finds a question and an answer in a row, by the path that a user names or by the formats that are published."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rl.data.rows import Row
from rl.data.section import DatasetSection
from rl.errors import UserError

Message = dict[str, Any]
"""A turn of a conversation: `role`, `content`, and what else its chat template reads."""
Question = str | list[Message]

_GROUND_TRUTH = "reward_model.ground_truth"
_QUESTIONS = ("prompt", "question", "problem", "input", "instruction", "messages")
_ANSWERS = ("label", "completion", "answer", "solution", "ground_truth", "target", "output")
_FORMATS = {
    ("prompt", _GROUND_TRUTH): "verl",
    ("prompt", "label"): "slime",
    ("input", "label"): "OpenRLHF",
    ("input", ""): "OpenRLHF",
    **{("prompt", answer): "TRL" for answer in ("", "completion", "answer", "solution", "ground_truth")},
}
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write it, UTF-8 cannot
_MISSING = object()


@dataclass(frozen=True)
class Fields:
    """Names where a row holds what a problem is made of, by dotted paths; "" for what it does not hold."""

    question: str
    answer: str
    tools: str  # of a question that is no conversation, another thing may be called so
    found: str  # what to say of those that were found, "" where the user named them

    def question_of(self, row: Row) -> Question:
        """Returns the text, or the messages without the answer that they may end in. UserError where there is neither."""
        value = value_at(row.record, self.question)
        if isinstance(value, str):
            return checked(value, self.question, row)
        if not is_conversation(value):
            raise UserError(f"{row.at}: no text field {self.question!r}{_kind(value)}{has(row)}")
        messages = [_message(message, f"message {i} of {self.question!r}", row) for i, message in enumerate(value, 1)]
        return messages[:-1] if _taught(messages) else messages

    def answer_of(self, row: Row) -> Any:
        """Returns the answer as it stands there: None where there is none."""
        if not self.answer:
            return self.last_of(row)
        value = value_at(row.record, self.answer)
        if is_conversation(value):
            return value[-1].get("content")
        return None if value is _MISSING else value

    def last_of(self, row: Row) -> Any:
        """Returns what the assistant says at the end of a conversation; None where that is not its end."""
        messages = value_at(row.record, self.question)
        return messages[-1].get("content") if _taught(messages) else None

    def tools_of(self, row: Row) -> list[Any]:
        """Returns the JSON schemas of the tools, which may stand there as one text."""
        value = value_at(row.record, self.tools)
        if value is None or value is _MISSING or value == "":
            return []
        try:
            tools = json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise UserError(f"{row.at}: field {self.tools!r}: not JSON: {error}") from None
        if not isinstance(tools, list):
            raise UserError(f"{row.at}: field {self.tools!r} is no list of JSON schemas, nor a text that is one")
        return [without_nulls(tool) for tool in tools]


def find_fields(section: DatasetSection, rows: Sequence[Row]) -> Fields:
    """Takes the fields that `section` names, and finds the others by their names; UserError where none, or several, may be
    meant."""
    columns = list(rows[0].record) if isinstance(rows[0].record, dict) else []
    if section.question is None and not columns:
        raise UserError(f"{rows[0].at}: not a JSON object")
    question = section.question or _only("question", [name for name in _QUESTIONS if name in columns], columns, rows[0])
    if section.answer is not None:
        answer = section.answer
    elif value_at(rows[0].record, _GROUND_TRUTH) is not _MISSING:
        answer = _GROUND_TRUTH
    else:
        candidates = [name for name in _ANSWERS if name in columns and name != question]
        answer = _only("answer", candidates, columns, rows[0]) if candidates else ""
    taught = not answer and _taught(value_at(rows[0].record, question))
    told = repr(answer) if answer else "its last message" if taught else ""
    known = _FORMATS.get((question, answer))
    found = f"question from {question!r}, " + (f"answer from {told}" if told else "no answer")
    by_user = section.question is not None and section.answer is not None
    return Fields(
        question, answer, section.tools or "tools", "" if by_user else f"{known}'s format: {found}" if known else found
    )


def _only(what: str, candidates: list[str], columns: list[str], row: Row) -> str:
    if len(candidates) == 1:
        return candidates[0]
    why = f"{' and '.join(candidates)} may each be the {what}" if candidates else f"no field is known as the {what}"
    raise UserError(f"{row.at}: {why}: set data.{what}=FIELD; the fields are {', '.join(map(str, columns))}")


def value_at(record: Any, path: str) -> Any:
    """Returns what stands at a dotted path ("reward_model.ground_truth", "choices.0"), or at a field whose name has dots."""
    if isinstance(record, Mapping) and path in record:
        return record[path]
    for part in path.split("."):
        if isinstance(record, Mapping) and part in record:
            record = record[part]
        elif isinstance(record, list) and part.isdecimal() and int(part) < len(record):
            record = record[int(part)]
        else:
            return _MISSING
    return record


def number_at(record: Any, path: str) -> float | None:
    """Returns the number at a dotted path, which a text may hold; None where there is no finite one."""
    value = value_at(record, path)
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def is_conversation(value: Any) -> bool:
    """Tells whether `value` is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def _taught(messages: Any) -> bool:
    """Tells whether a conversation ends in an answer."""
    return is_conversation(messages) and len(messages) > 1 and messages[-1]["role"] == "assistant"


def _message(message: Mapping[str, Any], which: str, row: Row) -> Message:
    """Returns the message without the keys that parquet fills with null because another message has them."""
    content = message.get("content", _MISSING)
    if not isinstance(message["role"], str) or not (content is None or isinstance(content, str | list)):
        raise UserError(f"{row.at}: {which} needs a role and a content, both texts")
    if isinstance(content, str):
        checked(content, which, row)
    return {key: without_nulls(value) for key, value in message.items() if value is not None or key == "content"}


def without_nulls(value: Any) -> Any:
    """Drops, at any depth, the keys whose value is null: rows of parquet have the keys of all other rows."""
    if isinstance(value, Mapping):
        return {key: without_nulls(below) for key, below in value.items() if below is not None}
    return [without_nulls(below) for below in value] if isinstance(value, list) else value


def text_of(question: Question) -> str:
    """Returns what a question says, whoever says it."""
    if isinstance(question, str):
        return question
    return "\n".join(content_text(message["content"]) for message in question)


def content_text(content: Any) -> str:
    """Returns the text of a message's content, which may be a list of blocks."""
    if isinstance(content, list):
        return "".join(block.get("text") or "" for block in content if isinstance(block, Mapping))
    return content or ""


def plain_text(value: Any) -> str | None:
    """Writes a text, a number or a bool as JSON would, a whole number without a fraction (7.0: 7), and a list of one of them as
    that one; None for anything else."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, str | Decimal):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))  # a column of int64 with a null is float64
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else None
    return str(value) if isinstance(value, int) else None


def checked(text: str, field: str, row: Row) -> str:
    """Returns `text`; UserError where UTF-8 cannot hold it."""
    if _SURROGATE.search(text):
        raise UserError(f"{row.at}: field {field!r} holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
    return text


def _kind(value: Any) -> str:
    return "" if value is _MISSING or value is None else f" (it is a {type(value).__name__})"


def has(row: Row) -> str:
    """Returns the fields of a row, as the end of a message."""
    return f"; the fields are {', '.join(map(str, row.record))}" if isinstance(row.record, dict) else ""
