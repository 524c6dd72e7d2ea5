"""Calls a reward as it was written to be called. Its signature says how:

    (problem, text) -> float                                             ours: rl.data.Problem, and the completion's text
    (prompts, completions, **columns) -> list of floats                  TRL's
    (data_source, solution_str, ground_truth, extra_info) -> float       verl's; or a dict with "score"
    (queries, prompts, labels, **more) -> dict with "rewards"            OpenRLHF's

TRL's and OpenRLHF's are called once with all samples of one problem, the others once a sample. Each gets the keyword arguments
that it has names for, or all of them where it takes **columns. None in place of a float: it has no say in this sample. Any of
them may be `async`, or a class, of which an instance is made with the arguments of the config.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from rl.rewards.claim import Claim, Found, found

_KINDS = (
    "(problem, text), TRL's (prompts, completions, **columns), verl's (data_source, solution_str, ground_truth, extra_info) or "
    "OpenRLHF's (queries, prompts, labels, **more)"
)
_PLAIN = (str, int, float, bool, type(None))

Started = tuple[Any, Callable[[Any], list[Found]]]
"""What a function returned, which may be awaitable, and what reads its result."""


class Function:
    """Calls a reward in its style."""

    def __init__(self, function: Any, args: Mapping[str, Any]) -> None:
        """TypeError for what cannot be called, or in no style."""
        if inspect.isclass(function):
            function, args = function(**args), {}
        if not callable(function):
            raise TypeError(f"{type(function).__name__!r} object is not callable")
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        self._function, self._args = function, dict(args)
        self._names, self._takes_all = _parameters(function)
        self._style = self._recognised()
        self.batched = self._style in (_trl, _openrlhf)

    def start(self, claims: Sequence[Claim]) -> Started:
        """Calls it: about one claim, or about all claims of one problem where it is `batched`."""
        return self._style(self, claims)

    def positional(self, *arguments: Any) -> Any:
        """Calls it with the arguments, and those of the config."""
        return self._function(*arguments, **self._args)

    def by_name(self, columns: Mapping[str, Any], **own: Any) -> Any:
        """Calls it with what it takes of its style's `own` arguments and of the row's `columns`. An argument of the config
        stands for a column of that name."""
        if strange := sorted(set(own) & set(self._args)):
            raise TypeError(f"args.{strange[0]} would stand for what every call has under that name")
        offered = {**columns, **own, **self._args}
        return self._function(
            **{k: v for k, v in offered.items() if self._takes_all or k in (*self._names, *self._args)}
        )

    def _recognised(self) -> "Callable[[Function, Sequence[Claim]], Started]":
        names = set(self._names)
        if "solution_str" in names:
            return _verl
        if {"queries", "labels"} <= names:
            return _openrlhf
        if names & {"prompts", "completions", "completion_ids"} or (self._takes_all and not names):
            return _trl
        try:
            inspect.signature(self._function).bind(None, None, **self._args)
        except TypeError:
            given = f" and args {', '.join(self._args)}" if self._args else ""
            raise TypeError(f"takes ({', '.join(self._names)}); a reward takes {_KINDS}{given}") from None
        except ValueError:
            pass  # a function of C need not have a signature
        return _own


def _parameters(function: Any) -> tuple[list[str], bool]:
    """Returns the names of its parameters, and whether it takes any keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return ["problem", "text"], False
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return named, any(p.kind == p.VAR_KEYWORD for p in parameters)


# each style: calls, and says how the result is read --------------------------------------------------------------------


def _own(function: Function, claims: Sequence[Claim]) -> Started:
    (claim,) = claims
    return function.positional(claim.problem, claim.text), _one


def _verl(function: Function, claims: Sequence[Claim]) -> Started:
    (claim,) = claims
    row = _row(claim)
    model = row.get("reward_model")
    known = model if isinstance(model, Mapping) else row
    result = function.by_name(
        {},
        data_source=row.get("data_source", ""),
        solution_str=claim.text,
        ground_truth=known.get("ground_truth", claim.problem.answer),
        extra_info=row.get("extra_info", row),
    )
    return result, _one


def _trl(function: Function, claims: Sequence[Claim]) -> Started:
    problem, row, count = claims[0].problem, _row(claims[0]), len(claims)
    completions: list[Any] = [claim.text for claim in claims]
    if problem.messages is not None:
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    if claims[0].state is not None:  # a conversation with an environment
        completions = [list(claim.messages) for claim in claims]
    notes: list[dict[str, Any]] = [{} for _ in claims]
    own = {
        "prompts": [problem.prompt if problem.messages is None else list(problem.messages)] * count,
        "completions": completions,
        "completion_ids": [list(claim.token_ids) for claim in claims],
        "trainer_state": None,
        "environments": [claim.state and SimpleNamespace(**claim.state) for claim in claims],
        "log_metric": partial(_log_metric, notes),
        "log_extra": partial(_log_extra, notes),
    }
    columns = {name: [value] * count for name, value in row.items() if name not in (*own, "prompt")}
    return function.by_name(columns, **own), lambda result: _all(list(result), notes)


def _openrlhf(function: Function, claims: Sequence[Claim]) -> Started:
    problem, row = claims[0].problem, _row(claims[0])
    prompts = [problem.prompt] * len(claims)
    labels = [row.get("label", problem.answer)] * len(claims)
    queries = [problem.prompt + claim.text for claim in claims]
    notes: list[dict[str, Any]] = [{} for _ in claims]

    def read(result: Any) -> list[Found]:
        for name, values in result.get("extra_logs", {}).items():
            _log_extra(notes, name, values)
        return _all(list(result["rewards"]), notes)

    return function.by_name({}, queries=queries, prompts=prompts, labels=labels), read


def _one(result: Any) -> list[Found]:
    if not isinstance(result, Mapping):
        return [found(result)]
    return [found(result["score"], {name: _plain(value) for name, value in result.items() if name != "score"})]


def _all(values: list[Any], notes: list[dict[str, Any]]) -> list[Found]:
    if len(values) != len(notes):
        raise ValueError(f"{len(values)} rewards for {len(notes)} completions")
    return [found(value, mine) for value, mine in zip(values, notes, strict=True)]


def _log_metric(notes: list[dict[str, Any]], name: str, value: Any) -> None:
    for mine in notes:
        mine[name] = float(value)


def _log_extra(notes: list[dict[str, Any]], name: str, values: Any) -> None:
    for mine, value in zip(notes, list(values), strict=True):
        mine[name] = _plain(value)


def _plain(value: Any) -> Any:
    """Returns what a log can hold: a number of numpy's or torch's becomes Python's, anything else a text."""
    if isinstance(value, _PLAIN):
        return value
    if callable(item := getattr(value, "item", None)):
        try:
            return item()
        except (TypeError, ValueError, RuntimeError):  # an array of several
            return str(value)
    return str(value)


def _row(claim: Claim) -> Mapping[str, Any]:
    record = claim.problem.record
    return record if isinstance(record, Mapping) else {}
