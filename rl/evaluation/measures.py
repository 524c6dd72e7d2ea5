"""Measures what a policy earned on problems, of which each has one or more samples. A sample is right where it earns 1 or more.

Whole numbers and fractions up to the last division, so that a figure is the same on every machine.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from rl.samples import Group, Sample

Stated = Callable[[str], str]
"""Tells what a completion's text states, so that equal answers are counted as one vote."""

_Z = 1.959963984540054  # of a normal distribution, 95% lie within so many standard deviations


@dataclass(frozen=True)
class Evaluation:
    """Holds what the policy earned on a set of problems. `accuracy` is avg@k: the mean over the problems of the share of their
    samples that are right."""

    accuracy: float
    reward: float  # mean over the problems of their samples' mean
    low: float = 0.0  # between this and `high` the accuracy lies with 95% confidence
    high: float = 1.0
    problems: int = 0
    samples: int = 0  # of all problems
    right: int = 0  # samples
    pass_at: dict[int, float] = field(default_factory=dict)  # by k
    majority: float | None = None  # maj@k for k = the samples of a problem; None with one sample each
    tokens: float = 0.0  # of a completion, in the mean
    truncated: float = 0.0  # share of the completions that their limit ended
    left_out: int = 0  # samples without a reward
    sets: Mapping[str, "Evaluation"] = field(default_factory=dict)  # what it earned on further ones, by their names

    @property
    def each(self) -> int:
        """Returns the samples of one problem."""
        return max(self.pass_at, default=1)

    def metrics(self, under: str = "eval") -> dict[str, float]:
        """Names the values as a log does, `under` a name; those of a set under its own."""
        found = {
            "accuracy": self.accuracy,
            "accuracy_low": self.low,
            "accuracy_high": self.high,
            "reward": self.reward,
            "response_length_mean": self.tokens,
            "truncated_frac": self.truncated,
        }
        found |= {f"pass@{k}": value for k, value in self.pass_at.items()}
        if self.majority is not None:
            found[f"maj@{self.each}"] = self.majority
        if self.left_out:
            found["left_out"] = float(self.left_out)
        named = {f"{under}/{name}": value for name, value in found.items()}
        return named | {key: x for name, one in self.sets.items() for key, x in one.metrics(f"{under}/{name}").items()}

    def told(self) -> str:
        """Says the values in one line, without who judged."""
        of = f"{self.right:,} of {self.samples:,}" + (
            f" samples of {self.problems:,} problems" if self.each > 1 else ""
        )
        best = "".join(f", pass@{k} {value:.3f}" for k, value in self.pass_at.items())
        vote = "" if self.majority is None else f", maj@{self.each} {self.majority:.3f}"
        lost = f", {self.left_out:,} left out" if self.left_out else ""
        return (
            f"accuracy {self.accuracy:.3f} (95%: {self.low:.3f} to {self.high:.3f}; {of} earn 1{best}{vote}, mean reward "
            f"{self.reward:.3f}, {self.tokens:.1f} tokens{lost}"
        )


def measure(groups: Sequence[Group], stated: Stated = str.strip) -> Evaluation:
    """Measures the samples of `groups`. A problem none of whose samples has a reward is left out."""
    all_samples = [sample for group in groups for sample in group.samples]
    judged = [kept for group in groups if (kept := [s for s in group.samples if s.reward is not None])]
    samples = [sample for group in judged for sample in group]
    shares = [Fraction(sum(map(_is_right, group)), len(group)) for group in judged]
    accuracy = _mean(shares)
    low, high = interval(shares)
    done = [c for s in all_samples for c in s.completions]
    return Evaluation(
        accuracy=float(accuracy),
        reward=math.fsum(math.fsum(map(_reward, g)) / len(g) for g in judged) / max(len(judged), 1),
        low=low,
        high=high,
        problems=len(judged),
        samples=len(samples),
        right=sum(map(_is_right, samples)),
        pass_at={k: float(value) for k, value in _pass_at(judged).items()},
        majority=float(_mean([majority(g, stated) for g in judged])) if any(len(g) > 1 for g in judged) else None,
        tokens=sum(len(c.token_ids) for c in done) / max(len(all_samples), 1),
        truncated=sum(c.finish_reason == "length" for c in done) / max(len(done), 1),
        left_out=len(all_samples) - len(samples),
    )


def pass_at(n: int, right: int, k: int) -> Fraction:
    """Estimates, without bias, the probability that one of `k` samples at least is right, from `n` samples of which `right`
    are: 1 - C(n - right, k) / C(n, k) (Chen et al. 2021, equation 1); 1 <= k <= n."""
    return 1 - Fraction(math.comb(n - right, k), math.comb(n, k))


def majority(samples: Sequence[Sample], stated: Stated) -> Fraction:
    """Computes maj@k over all k samples of a problem: whether what most of them state is right (Wang et al. 2022, section 2).
    Where several answers have as many votes, their mean: what choosing one by lot would give."""
    votes: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for sample in samples:
        said = stated(sample.text)
        votes[said] += 1
        right[said] += _is_right(sample)
    most = max(votes.values())
    return _mean([Fraction(right[said], most) for said, count in votes.items() if count == most])


def interval(shares: Sequence[Fraction]) -> tuple[float, float]:
    """Returns (low, high) of the 95% confidence interval of the mean of `shares`, each of 0 .. 1 and of one problem.

    Wilson's score interval (1927) for as many independent yes-or-no answers as have the problems' own variance: p (1 - p) / V
    with V the variance of the mean, so that samples of one problem do not count as independent; at p of 0 or 1 one a problem.
    With one sample a problem it is Wilson's interval of the problems but for n - 1 in V.
    """
    n = len(shares)
    if not n:
        return 0.0, 1.0
    p = _mean(shares)
    spread = sum((s - p) ** 2 for s in shares) / (n * (n - 1)) if n > 1 else Fraction(0)
    trials = float(p * (1 - p) / spread) if spread else float(n)
    centre, z = float(p), _Z * _Z / trials
    half = _Z * math.sqrt(float(p * (1 - p)) / trials + z / (4 * trials)) / (1 + z)
    middle = (centre + z / 2) / (1 + z)
    return max(0.0, min(centre, middle - half)), min(1.0, max(centre, middle + half))  # rounding, at p of 0 or 1


def _pass_at(groups: Sequence[Sequence[Sample]]) -> dict[int, Fraction]:
    """pass@k for k = 2, 4, 8 ... and for all samples, over the problems that have k."""
    most = max(map(len, groups), default=1)
    found = {}
    for k in sorted({2**i for i in range(1, most.bit_length())} | {most} - {1}):
        found[k] = _mean([pass_at(len(g), sum(map(_is_right, g)), k) for g in groups if len(g) >= k])
    return found


def _mean(values: Sequence[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / max(len(values), 1)


def _reward(sample: Sample) -> float:
    assert sample.reward is not None
    return sample.reward


def _is_right(sample: Sample) -> bool:
    return _reward(sample) >= 1
