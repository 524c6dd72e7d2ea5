"""Runs from Python: what `python -m rl.train` does, with functions and data as objects.

```
from rl.api import run

def reward(problem, text):
    return float(text.strip() == problem.answer)

rows = [{"question": f"{a}+{b}=", "answer": a + b} for a in range(40) for b in range(40)]
summary = run("model.path=DIR", "warmup.steps=0", "logger=none", reward=reward, data=rows)
```
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.scratch import scratch
from rl.command_line import quoted
from rl.compose import check
from rl.config import validate
from rl.data.splits import without_bars
from rl.errors import UserError
from rl.prepare import prepare
from rl.run.screen import Screen
from rl.train import train

if TYPE_CHECKING:
    import datasets

OneReward = Callable[..., Any] | str | Mapping[str, Any]
"""A function in any style of docs/rewards.md, a name as `reward=` has it, or {function, weight, args, name} of either."""


def run(
    *overrides: str,
    reward: OneReward | Sequence[OneReward] | None = None,
    data: "datasets.DatasetDict | datasets.Dataset | Sequence[Mapping[str, Any]] | None" = None,
    held_out: "datasets.Dataset | Sequence[Mapping[str, Any]] | None" = None,
    environment: Callable[..., Any] | str | None = None,
) -> dict[str, Any]:
    """Does a whole run and returns its summary, as summary.json has it.

    overrides  keys as on the command line: "steps=20", "+recipe=gsm8k_tiny", "model.path=DIR"
    reward     a function is called in this process, without a time-out; an async one is awaited
    data       rows to train on, in any format of docs/data.md
    held_out   rows that are never trained on; None: the split `test` of a DatasetDict, or one row in eight
    environment  a class as TRL's environment_factory has it (docs/environments.md), whose objects live in this process, without
               a time-out; or its name, as `environment.factory=` has it

    Raises UserError for bad input, before anything is started, and RunError or AlignmentError where the run has to stop. The
    trained weights are those of the same run by the command line. A run goes on (`out_dir`) when it is given the same objects.
    """
    with scratch() as folder:
        given = () if data is None else ("data=dataset", f"data.path={_save(data, held_out, folder / 'data')}")
        if held_out is not None and data is None:
            raise UserError("held_out without data: name it by data.held_out, or give both")
        objects = dict[str, Any]()
        talk = _talk(environment, objects)
        configs = check([*given, *talk, *overrides])
        if len(configs) > 1:
            raise UserError(f"these overrides stand for {len(configs)} runs: give one at a time")
        config = configs[0]
        if reward is not None:
            several = reward if isinstance(reward, Sequence) and not isinstance(reward, str) else [reward]
            named = [_named(one, objects) for one in several]
            config = validate(config.model_dump(mode="json") | {"reward": named})
        return train(config, Screen(), prepare=partial(prepare, objects=objects))


def _talk(factory: Callable[..., Any] | str | None, objects: dict[str, Any]) -> list[str]:
    """Returns the overrides of an environment; a class stands by its name in `objects`."""
    if factory is None:
        return []
    name = factory if isinstance(factory, str) else _name(factory)
    if not isinstance(factory, str):
        objects[name] = factory
    return ["environment.name=tools", quoted("environment.factory", name)]


def _name(found: Any) -> str:
    """Names a function, a class or an object that is called, as module:name."""
    kind = found if hasattr(found, "__qualname__") else type(found)
    return f"{kind.__module__}:{kind.__qualname__}"


def _named(reward: OneReward, objects: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry of the config's list, where a function stands by its name in `objects`."""
    entry = dict(reward) if isinstance(reward, Mapping) else {"function": reward}
    function = entry.get("function")
    if callable(function):
        name = _name(function)
        if objects.setdefault(name, function) is not function:
            raise UserError(f"two rewards are called {name}: give one of them another name")
        entry |= {"function": name, "name": entry.get("name") or name.rpartition(":")[2].rpartition(".")[2].strip("<>")}
    return entry


def _save(data: Any, held_out: Any, folder: Path) -> Path:
    """Saves the rows as `datasets` does, in splits."""
    import datasets

    def rows(given: Any) -> Any:
        return given if isinstance(given, datasets.Dataset) else datasets.Dataset.from_list([dict(r) for r in given])

    try:
        splits = dict(data) if isinstance(data, datasets.DatasetDict) else {"train": rows(data)}
        if held_out is not None:
            splits["test"] = rows(held_out)
        with without_bars():
            datasets.DatasetDict(splits).save_to_disk(folder)
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"data: {' '.join(str(error).split())[:300]}") from None
    return folder
