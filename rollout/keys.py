"""Defines the keys of an engine: name, type, range and meaning of each, once.

The config of a run (rl/config.py), the arguments of `rollout.serve` and `rollout.verify`, and the engine's own dataclasses take
theirs from here. A default is the business of whoever has one; where 0 stands for "decided for you", `Open` says how.
"""

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from kernels.host.command import MOST_THREADS

_MOST = 2**60 - 1  # of any number that has no other bound


@dataclass(frozen=True)
class Key:
    """Says what a key means and, of a number, its bounds, both included. Pydantic reads them too, by the method below."""

    description: str = ""
    ge: float = 0
    le: float = _MOST

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        schema = handler(source)
        return schema | {"ge": self.ge, "le": self.le} if schema["type"] in ("int", "float") else schema


Leaves = Annotated[
    int,
    Key(
        ge=1,
        description="leaves of every contraction, a power of two: the largest tp that may ever be used",
    ),
]
Dtype = Literal["auto", "float32", "bfloat16"]
Format = Annotated[
    Literal["auto", "plain", "fp8_block", "fp8_block_ue8m0"],
    Key(
        description="of the projections' weights, and of what they multiply: plain: numbers of the model's dtype; fp8_block: "
        "e4m3, a scale for each 128 x 128 of a weight and 128 columns of an activation; fp8_block_ue8m0: its scales are powers "
        "of two"
    ),
]
Device = Literal["auto", "cpu", "cuda"]
Family = Annotated[
    Literal["auto", "portable"],
    Key(
        description="of the kernels that a GPU runs: auto: the card's own; portable: plain Triton, of every card since 8.0"
    ),
]
Tp = Annotated[int, Key(ge=1, description="tensor-parallel processes of one engine")]
Threads = Annotated[int, Key(ge=1, le=MOST_THREADS, description="CPU threads of each process")]
Pages = Annotated[int, Key(ge=1, description="key-value pages of one engine")]
PageSize = Annotated[int, Key(ge=1, description="tokens of a page")]
PrefixCache = Annotated[bool, Key(description="keep the pages of common prefixes for later requests")]
Speculate = Annotated[
    Literal["auto", "off"],
    Key(description="auto: check drafted tokens along with a step where that is faster; no bit depends on it"),
]
MaxRunning = Annotated[int, Key(ge=1, description="sequences in one batch")]
MaxBatchTokens = Annotated[int, Key(ge=1, description="tokens computed in one engine step")]
PrefillChunk = Annotated[int, Key(ge=1, description="tokens of one sequence computed in one engine step")]


@dataclass(frozen=True)
class Open:
    """Marks a key that may be 0: what is meant then."""

    how: str


@dataclass(frozen=True)
class Range:
    """Which values a key takes, and what it means. `choices`: of a text; else of a number, both bounds included."""

    least: float
    most: float
    choices: tuple[str, ...]
    meaning: str


def range_of(hint: Any) -> Range:
    """Reads the range and the meaning in a type above, alone or with an `Open` beside it."""
    notes = getattr(hint, "__metadata__", ())
    kind = get_args(hint)[0] if notes else hint
    declared = [note for note in notes if isinstance(note, Key)]
    opened = [note.how for note in notes if isinstance(note, Open)]
    meaning = [field.description for field in declared if field.description] + [f"0: {how}" for how in opened]
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    least, most = max([0, *(key.ge for key in declared)]), min([_MOST, *(key.le for key in declared)])
    return Range(0 if opened else least, most, choices, "; ".join(meaning))


@cache
def ranges(kind: Any) -> dict[str, Range]:
    """The range of every field of a dataclass."""
    return {name: range_of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def check(config: Any, error: type[Exception]) -> None:
    """Raises `error` with the first field of a dataclass that is out of its range, and what it may be."""
    kind: Any = type(config)
    for name, known in ranges(kind).items():
        value = getattr(config, name)
        if known.choices and value not in known.choices:
            raise error(f"{name}={value} must be {', '.join(known.choices[:-1])} or {known.choices[-1]}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value > known.most and known.most < _MOST:
            raise error(f"{name}={value} must be at most {known.most}")
        if not known.least <= value <= known.most:  # also no NaN
            raise error(f"{name}={value} must be at least {known.least}, and below 2^60")
