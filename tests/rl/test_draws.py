"""Draws from a seed: of the ranges they should have, each as often as the others, and the same for ever."""

import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.data.draws import Draws

RECORDED = "363751ba396feae17c8bb2d68248f645035e2470d00d4c1af6a34e3caae29d23"
KEYS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))


@given(KEYS, st.integers(1, 300))
def test_a_permutation_has_each_number_once(key: tuple[int, int], n: int) -> None:
    order = Draws(*key).permutation(n)
    assert sorted(order) == list(range(n)) and order == Draws(*key).permutation(n)


@given(KEYS, st.integers(1, 2**32))
def test_ranges(key: tuple[int, int], n: int) -> None:
    draws = Draws(*key)
    assert all(0 <= draws.below(n) < n for _ in range(20))
    assert all(0 <= draws.fraction() < 1 for _ in range(20))


@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_each_is_as_likely_as_the_others(n: int) -> None:
    draws = Draws(5, n)
    places = Counter(draws.permutation(n)[0] for _ in range(6000))
    below = Counter(draws.below(n) for _ in range(6000))
    for counts in (places, below):
        assert set(counts) == set(range(n)) and all(abs(c - 6000 / n) < 5 * (6000 / n) ** 0.5 for c in counts.values())


def test_ranges_that_reject_nearly_every_other_word() -> None:
    """n just above 2^31: half of the words are drawn again, and the rest still covers 0 .. n - 1 evenly."""
    draws, n = Draws(1, 1), 2**31 + 1
    low = sum(draws.below(n) < n // 2 for _ in range(4000))
    assert abs(low - 2000) < 5 * 1000**0.5


def test_the_stream_is_the_recorded_one() -> None:
    """Whatever numpy makes of its own generators: halves of words, whole words and ranges in turn."""
    draws = Draws(3, 1 << 32 | 5)
    drawn = [draws.permutation(1000), *([draws.fraction(), draws.below(n), draws.below(1)] for n in range(1, 100))]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest() == RECORDED
