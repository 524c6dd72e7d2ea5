"""Declares what makes further requests of completions, while the engines go on with others."""

from collections.abc import Sequence
from typing import Protocol

from rollout.sampling import Completion, Request

STEPS = 8
"""Steps that an engine does between two looks at what is new: few enough that an answer does not wait long, and enough that
asking costs little beside them."""


class Replies(Protocol):
    """Takes completions and makes the requests that follow them. Which requests these are depends on the completions alone, and
    not on when anybody asks."""

    def take(self, completions: Sequence[Completion]) -> None:
        """Hears of samples that ended."""

    def requests(self, idle: bool) -> list[Request]:
        """Returns the requests that are ready by now. `idle`: no engine has anything to do, so it waits for one; an empty
        answer then says that none will come."""
