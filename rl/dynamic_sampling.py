"""Samples further problems in the place of groups that teach nothing (Yu et al. 2025, "DAPO", section 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass

from rl.algorithms.advantages import has_signal
from rl.samples import Group, Transcript


@dataclass(frozen=True)
class Drawn:
    """Holds the groups of a step, in the order of their problems."""

    groups: list[Group]
    rounds: int  # of sampling
    dropped: int  # groups that were sampled and are not trained on

    def metrics(self) -> dict[str, int]:
        """Names the counts as a log does."""
        return {"sampling/rounds": self.rounds, "sampling/groups_dropped": self.dropped}

    def transcripts(self) -> list[Transcript]:
        """Returns what the weights of the step drew of these groups, in the order in which it is trained on."""
        return [sample.transcript for group in self.groups for sample in group.samples]


def draw_groups(draw: Callable[[int, int], list[Group]], wanted: int, rounds: int) -> Drawn:
    """Draws `wanted` groups; then, in at most `rounds` rounds in all, as many more as have no signal (`has_signal`). What is
    missing after the last round is filled with the first of those, since the size of a batch is fixed.

    `draw` (first, count) samples the step's problems first .. first + count.
    """
    groups: list[Group] = []
    silent: list[int] = []  # of these, by number
    missing, done = wanted, 0
    while missing and done < rounds:
        groups += draw(len(groups), missing)
        silent = [i for i, group in enumerate(groups) if not has_signal(group)]
        missing, done = wanted - len(groups) + len(silent), done + 1
    dropped = set(silent[missing:])
    return Drawn([group for i, group in enumerate(groups) if i not in dropped], done, len(dropped))
