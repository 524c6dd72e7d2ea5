"""What several answers to one request have in common: everything, to the bit, or where they part."""

import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rollout.sampling import Completion


def pattern(value: float) -> int:
    """Returns the 32 bits of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@dataclass(frozen=True)
class Answer:
    """Holds the tokens and all log-probs of one sample. `places`: of each log-prob in the text, for messages."""

    tokens: tuple[int, ...]
    logprobs: tuple[
        float, ...
    ]  # of the prompt from its second token, if they were asked for, then of the sampled tokens

    @classmethod
    def of(cls, completion: Completion) -> "Answer":
        """Takes the tokens and the log-probs, the prompt's first, of a completion."""
        return cls(completion.token_ids, (*completion.prompt_logprobs, *completion.logprobs))


@dataclass(frozen=True)
class Row:
    """Holds one line of the verdict."""

    mode: str
    case: str
    samples: int
    unique_samples: int  # different texts
    differing_bits: int  # of log-probs, against the first sample
    first_difference: str  # the coordinate and both bit patterns; empty where there is none
    hollow: str = ""  # why the row proves nothing

    @property
    def holds(self) -> bool:
        """Says whether all samples are the same to the bit, and enough was compared to say so."""
        return self.unique_samples == 1 and self.differing_bits == 0 and not self.hollow

    def line(self) -> str:
        """Formats the verdict as a line, and the first difference as a second one."""
        text = (
            f"{self.mode:12} {self.case:36} {self.samples:5} samples   Unique samples: {self.unique_samples}   "
            f"differing bits: {self.differing_bits}"
        )
        return "\n    ".join(filter(None, [text, self.first_difference, self.hollow and f"hollow: {self.hollow}"]))

    def json(self) -> dict[str, Any]:
        """Returns the fields of the row, and whether it holds."""
        return {**asdict(self), "holds": self.holds}


def compare(mode: str, case: str, answers: Sequence[Answer], names: Sequence[str], hollow: str = "") -> Row:
    """Compares all answers with the first; `names` say where each comes from."""
    reference, bits, first = answers[0], 0, ""
    for answer, name in zip(answers[1:], names[1:], strict=True):
        here = _difference(reference, answer)
        bits += sum(
            (pattern(a) ^ pattern(b)).bit_count() for a, b in zip(reference.logprobs, answer.logprobs, strict=False)
        )
        if here and not first:
            first = f"{names[0]} against {name}: {here}"
    texts = len({a.tokens for a in answers})
    return Row(mode, case, len(answers), texts, bits, first, hollow)


def _difference(a: Answer, b: Answer) -> str:
    prompt = len(a.logprobs) - len(a.tokens)
    for i, (x, y) in enumerate(zip(a.logprobs, b.logprobs, strict=False)):
        place = f"prompt token {i + 1}" if i < prompt else f"sampled token {i - prompt}"
        if i >= prompt and i - prompt < len(b.tokens) and a.tokens[i - prompt] != b.tokens[i - prompt]:
            return f"{place}: id {a.tokens[i - prompt]} against {b.tokens[i - prompt]}, {_both(x, y)}"
        if pattern(x) != pattern(y):
            return f"{place}: {_both(x, y)}"
    if len(a.logprobs) != len(b.logprobs):
        return f"{len(a.logprobs)} log-probs against {len(b.logprobs)}"
    return ""


def _both(x: float, y: float) -> str:
    return f"log-prob {x!r} (0x{pattern(x):08x}) against {y!r} (0x{pattern(y):08x})"
