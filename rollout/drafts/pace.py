"""Decides how many tokens to draft, by what a step costs and how often drafts are right. It decides speed alone."""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from statistics import median

from rollout.graphs import padded
from rollout.scheduler import MOST_DRAFTED

GAIN = 1.02
"""A step with drafts must bring at least so many times the tokens a second of one without."""

LEAST = 1 / 64
"""Chance that a drafted token is taken, below which it is not worth a thought."""

LONGEST_REST = 32
"""Steps without drafts, at most, before it is tried again whether they pay."""

FRESH = 256
"""Steps for which the cost of a step without drafts, which grows with the texts, is taken for known."""

TOLD = 4
"""Measurements that ranks share at once."""

Share = Callable[[list[float]], list[float]]
"""Numbers of this rank -> those of the first rank: all ranks must decide alike, and their clocks differ."""


class Costs:
    """Measures the seconds of decoding steps, with and without drafts, by the size of their batch: medians of the last few."""

    def __init__(self, share: Share | None = None) -> None:
        """`share`: where there are several ranks."""
        self._share = share
        self._untold: list[tuple[bool, int, float]] = []
        self._last: dict[tuple[bool, int], deque[float]] = {}
        self._curve: list[
            tuple[int, float]
        ] = []  # (size, seconds) of a step with drafts, of one without where none was

    def record(self, drafted: bool, rows: int, seconds: float) -> None:
        """Takes a measurement of a step of so many rows, drafted ones among them or not."""
        self._untold.append((drafted, padded(rows), seconds))
        if self._share and len(self._untold) < TOLD:
            return
        told = [seconds for _, _, seconds in self._untold]
        for (kind, size, _), agreed in zip(self._untold, self._share(told) if self._share else told, strict=True):
            self._last.setdefault((kind, size), deque(maxlen=5)).append(agreed)
        self._untold.clear()
        sizes = {size: median(last) for (kind, size), last in self._last.items() if not kind}
        sizes |= {size: median(last) for (kind, size), last in self._last.items() if kind}
        self._curve = sorted(sizes.items())

    def plain(self, running: int) -> float | None:
        """Returns the seconds of a step of so many sequences without drafts; None: not measured yet."""
        last = self._last.get((False, padded(running)))
        return median(last) if last else None

    def drafted(self, rows: int) -> float | None:
        """Estimates the seconds of a step with drafts: on a line between the sizes that were measured, no more than the largest
        up to twice its size (so that it is tried), None above."""
        size = padded(rows)
        at = bisect_left(self._curve, (size, 0.0))
        if at == len(self._curve):
            return self._curve[-1][1] if self._curve and size <= 2 * self._curve[-1][0] else None
        above, seconds = self._curve[at]
        if above == size or at == 0:
            return seconds
        below, less = self._curve[at - 1]
        return less + (seconds - less) * (size - below) / (above - below)


class Pace:
    """Asks for drafts where they pay: rests longer and longer while they do not."""

    def __init__(self, rows: int, share: Share | None = None) -> None:
        """`rows`: of a step at most."""
        self.rows, self.costs = rows, Costs(share)
        self.reach = 4  # tokens that a draft is to have
        self._rest, self._wait, self._steps = 0, 1, 0
        self._measured: dict[int, int] = {}  # size -> the step in which its cost without drafts was asked for last

    def wants(self, running: int) -> bool:
        """Says whether the next step of so many sequences is to be drafted for; asked once a step."""
        self._steps += 1
        if running == 0 or 2 * running > self.rows:
            return False
        size = padded(running)
        if self.costs.plain(running) is None or self._steps - self._measured.get(size, -FRESH) > FRESH:
            return False
        self._rest -= 1
        return self._rest < 0

    def lengths(self, running: int, chances: Many[tuple[float, int]], room: int) -> list[int]:
        """Returns how many drafted tokens of each sequence to check. `chances`: of each, (how likely each next token of its
        draft is right, tokens that it has); `room`: rows for them all. Takes the likeliest, as many as bring the most tokens a
        second, by whole sizes of a graph; none where that is no more than without drafts."""
        gains = []
        for i, (p, length) in enumerate(chances):
            gain = p
            while length and gain > LEAST:
                gains.append((gain, i))
                gain, length = gain * p, length - 1
        gains = sorted(gains, reverse=True)[:room]
        best, chosen, expected = GAIN * running / (self.costs.plain(running) or 1.0), 0, float(running)
        for count, (gain, _) in enumerate(gains, 1):
            expected += gain
            rows = running + count
            if rows != padded(rows) and count < len(gains):
                continue
            seconds = self.costs.drafted(rows)
            if seconds is None:
                break
            if expected / seconds > best:
                best, chosen = expected / seconds, count
        out = [0] * len(chances)
        for _, i in gains[:chosen]:
            out[i] += 1
        self._settle(max(out, default=0))
        return out

    def _settle(self, longest: int) -> None:
        if longest:
            self._rest, self._wait = 0, 1
        else:
            self._rest, self._wait = self._wait, min(2 * self._wait, LONGEST_REST)
        self.reach = min(max(4, 2 * longest), MOST_DRAFTED)

    def record(self, drafted: bool, running: int, rows: int, seconds: float) -> None:
        """Takes the seconds of a step of so many sequences and rows."""
        if not drafted:
            self._measured[padded(running)] = self._steps
        self.costs.record(drafted, rows, seconds)

    def plain(self, running: int) -> float | None:
        """Returns the seconds of a step of so many sequences without drafts; None: not known."""
        return self.costs.plain(running)
