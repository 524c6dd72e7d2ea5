"""Calls functions that are objects of this process, as a notebook has them; the others in a pool."""

import asyncio
import inspect
from collections.abc import Mapping, Sequence

from rl.errors import RunError
from rl.rewards.claim import Claim, Found, raised
from rl.rewards.pool import Pool
from rl.rewards.styles import Function
from rl.rewards.worker import Call, Kind


class Here:
    """Calls functions of this process, as a pool calls its own. A function of this process has no time-out, and what it raises
    is told; if it ends the process, nobody can tell."""

    def __init__(self, functions: Mapping[int, Function], pool: Pool | None) -> None:
        """`functions`: by their place among all; those of the pool have the other places, in their order."""
        self._functions, self._pool = functions, pool
        others = iter(pool.kinds if pool else ())
        count = len(functions) + (len(pool.kinds) if pool else 0)
        self.kinds = [
            Kind(functions[i].batched, functions[i].is_async) if i in functions else next(others) for i in range(count)
        ]
        self._place = {i: place for place, i in enumerate(i for i in range(count) if i not in functions)}

    def __call__(self, calls: Sequence[Call], until_error: bool) -> list[list[Found]]:
        """Returns what each call finds, in the order of the calls; `until_error`: up to the first with an error."""
        theirs = [c._replace(function=self._place[c.function]) for c in calls if c.function not in self._functions]
        answers = iter(self._pool(theirs, until_error) if self._pool and theirs else ())
        found: list[list[Found]] = []
        for call in calls:
            mine = self._functions.get(call.function)
            answer = _called(mine, call.claims) if mine else next(answers, None)
            if answer is None:
                break
            found.append(answer)
            if until_error and any(f.error for f in answer):
                break
        return found


def _called(function: Function, claims: Sequence[Claim]) -> list[Found]:
    try:
        result, read = function.start(claims)
        return read(asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result)
    except RunError:  # an actor of the run, which this asks, is lost
        raise
    except Exception as error:  # and not an interrupt, which is the user's
        return [Found(error=f"raised {raised(error)}")] * len(claims)


async def _awaited(result: object) -> object:
    return await result  # type: ignore[misc]
