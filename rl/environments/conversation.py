"""Follows conversations from turn to turn: what the policy wrote, what its tools answered, and how each ended."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rl.data import Problem
from rl.environments.formats.call import Call
from rl.environments.hosts import Seat
from rl.environments.worker import Action, Result
from rl.samples import completions
from rollout.sampling import Completion, Request

Message = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Says what a conversation came to, beside its tokens."""

    messages: tuple[Message, ...]  # what follows the prompt: of the assistant and of the tools
    error: str = ""  # why it is left out, as the end of "the environment ..."
    reward: float | None = None  # that of its environment; None: it has no say
    state: Mapping[str, Any] = field(default_factory=dict)  # public attributes of the environment at the end
    counts: Mapping[str, float] = field(default_factory=dict)


class Played(tuple[tuple[int, ...] | Completion, ...]):
    """Holds a transcript together with what it came to."""

    outcome: Outcome

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, ...] | Completion], outcome: Outcome) -> "Played":
        """Joins the two."""
        played = cls(pieces)
        played.outcome = outcome
        return played


@dataclass(eq=False)
class Conversation:
    """Holds one conversation while it is under way."""

    first: Request
    problem: Problem
    seat: Seat
    pieces: list[tuple[int, ...] | Completion] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    error: str = ""
    reward: float | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)  # of the last completion
    counts: dict[str, float] = field(
        default_factory=lambda: {"tool_calls": 0.0, "malformed_calls": 0.0, "tool_errors": 0.0, "cut": 0.0}
    )

    @property
    def ids(self) -> tuple[int, ...]:
        """Returns all tokens so far."""
        return tuple(i for p in self.pieces for i in (p.token_ids if isinstance(p, Completion) else p))

    @property
    def turns(self) -> int:
        """Counts the completions so far."""
        return len(completions(tuple(self.pieces)))

    def row(self) -> dict[str, Any]:
        """Returns what reset is called with: the fields of the problem's row, and its prompt."""
        record = self.problem.record
        row = dict(record) if isinstance(record, Mapping) else {}
        return {"prompt": self.problem.messages or self.problem.prompt} | {str(k): v for k, v in row.items()}

    def request(self, limit: int) -> Request:
        """Asks for the next completion: after all tokens so far, up to `limit` tokens of a whole conversation. The seed is the
        first one's, since noise is keyed by the token's position too."""
        ids, sampling = self.ids, self.first.sampling
        most = min(sampling.max_new_tokens, limit - len(ids))
        return replace(self.first, prompt_ids=ids, sampling=replace(sampling, max_new_tokens=most))

    def actions(self) -> list[Action]:
        """Returns the calls that can be made."""
        return [Action("tool", call.name, call.arguments) for call in self.calls if not call.error]

    def answered(self, results: Sequence[Result]) -> list[Message]:
        """Returns the tools' messages, one for each call, in their order. `results`: of the calls that could be made."""
        made, told = iter(results), list[Message]()
        for call in self.calls:
            result = None if call.error else next(made)
            self.counts["tool_errors"] += bool(result and result.raised)
            self.counts["malformed_calls"] += result is None
            text = result.value if result else _told(call.error)
            named = {"tool_call_id": call.id} if call.id else {}
            told.append({"role": "tool", "name": call.name or "tool", "content": text, **named})
        self.counts["tool_calls"] += len(self.calls)
        self.messages += told
        return told

    def played(self) -> Played:
        """Returns what it came to."""
        counts = {"turns": float(self.turns), **self.counts, "errors": float(bool(self.error))}
        outcome = Outcome(tuple(self.messages), self.error, self.reward, self.state, counts)
        return Played.of(self.pieces, outcome)


def _told(error: str) -> str:
    return json.dumps({"error": error})


def summed(outcomes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the metrics of conversations: means of what each counted, of errors the number."""
    names = {name: None for counts in outcomes for name in counts}
    totals = {name: math.fsum(counts.get(name, 0.0) for counts in outcomes) for name in names}
    means = {f"environment/{n}_mean": x / len(outcomes) for n, x in totals.items() if n not in ("errors", "cut")}
    return means | {
        "environment/cut_frac": totals.get("cut", 0.0) / len(outcomes),
        "environment/errors": totals.get("errors", 0.0),
    }
