"""Mixes sources: each problem is judged by its own, and how often it comes is its source's weight."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Protocol

from rl.data import tokenizer as tokenizers
from rl.data.problem import Problem, Share, Source
from rl.data.question_answer import seen
from rl.data.section import MixtureSection
from rl.errors import UserError
from rollout.tokenizer import Tokenizer


class Unread(Protocol):
    """Declares what is known of problems before there is a tokenizer."""

    template: str | None
    """The chat template that the user names."""

    def texts(self) -> Iterator[str]:
        """Yields the texts that a tokenizer may be made from."""

    def tokenizer(self) -> Tokenizer:
        """Makes a tokenizer from them."""

    def source(self, tokenizer: Tokenizer, made: bool) -> Source:
        """Makes the problems; `made`: the tokenizer was made from their texts."""


class Mixture:
    """Holds sources by their names, in alphabetical order."""

    def __init__(self, section: MixtureSection, parts: Mapping[str, Unread]) -> None:
        """UserError for a weight of a source that there is not."""
        if unknown := sorted(set(section.weights) - set(parts)):
            raise UserError(f"data.weights.{unknown[0]}: there is no such source; data.sources has {', '.join(parts)}")
        self._section, self._parts = section, dict(sorted(parts.items()))
        templates = {part.template for part in parts.values() if part.template}
        self.template = templates.pop() if len(templates) == 1 else None

    def texts(self) -> Iterator[str]:
        """Yields the texts of all sources."""
        return (text for part in self._parts.values() for text in part.texts())

    def tokenizer(self) -> Tokenizer:
        """Makes one from all texts."""
        return tokenizers.byte_level_bpe(self.texts(), self._section.vocab_size, self.template)

    def source(self, tokenizer: Tokenizer, made: bool) -> Source:
        """Makes the problems of all sources; a problem's id begins with the name of its source."""
        sources = {name: _made(name, part, tokenizer, made) for name, part in self._parts.items()}
        if empty := [name for name, source in sources.items() if not source.train]:
            raise UserError(f"data.sources.{empty[0]} leaves no problems to train on")
        train = [_named(name, p) for name, source in sources.items() for p in source.train]
        held_out = _interleaved({name: [_named(name, p) for p in s.held_out] for name, s in sources.items()})
        shares = tuple(Share(len(s.train), self._section.weights.get(name, 1)) for name, s in sources.items())
        ranked = any(source.ranks for source in sources.values())

        def judge(problem: Problem, text: str) -> float:
            return sources[problem.id.partition("/")[0]].judge(problem, text)

        return Source(
            train,
            held_out,
            judge,
            tokenizer,
            left_out=sum(source.left_out for source in sources.values()),
            verifier=", ".join(dict.fromkeys(source.verifier for source in sources.values())),
            warnings=tuple(filter(None, (*_said({n: s.warnings for n, s in sources.items()}), seen(train, held_out)))),
            rows_sha256=_checksum(sources),
            about=tuple(
                _said({name: _about(s, share) for (name, s), share in zip(sources.items(), shares, strict=True)})
            ),
            shares=shares,
            ranks=tuple(r for s in sources.values() for r in (s.ranks or [0.0] * len(s.train))) if ranked else (),
        )


def _made(name: str, part: Unread, tokenizer: Tokenizer, made: bool) -> Source:
    try:
        return part.source(tokenizer, made)
    except UserError as error:
        raise UserError(f"data.sources.{name}: {error}") from None


def _named(name: str, problem: Problem) -> Problem:
    return replace(problem, id=f"{name}/{problem.id}")


def _interleaved(parts: Mapping[str, list[Problem]]) -> list[Problem]:
    """Spreads the problems of each part evenly over the whole: its first ones, which an evaluation takes, are of all parts."""
    placed = [((2 * i + 1) / (2 * len(part)), p) for part in parts.values() for i, p in enumerate(part)]
    return [p for _, p in sorted(placed, key=lambda one: one[0])]


def _about(source: Source, share: Share) -> tuple[str, ...]:
    return (
        f"{share.problems:,} problems to train on, weight {share.weight}, {len(source.held_out):,} held out",
        *source.about,
    )


def _said(lines: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [f"{name}: {line}" for name, of_one in lines.items() for line in of_one]


def _checksum(sources: Mapping[str, Source]) -> str:
    rows = {name: source.rows_sha256 for name, source in sources.items()}
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest() if any(rows.values()) else ""
