"""The check of every step: silent on equal bytes, one line with the place on a single differing bit."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.align import AlignmentError, check

LAYOUT = (np.array([0, 0, 3, 3]), np.array([5, 6, 40, 41]), np.array([11, 12, 13, 198]))
VALUES = np.array([-0.25, -1.0, np.nan, -0.5], np.float32)


def flipped(at: int, bit: int) -> np.ndarray:
    patterns = VALUES.copy().view(np.uint32)
    patterns[at] ^= np.uint32(1 << bit)
    return patterns.view(np.float32)


@pytest.mark.parametrize("policy", ["fail", "warn"])
def test_equal_bytes_are_silent(policy, capsys):
    assert check(VALUES, VALUES.copy(), *LAYOUT, policy, 1) is None
    assert capsys.readouterr() == ("", "")


@given(st.integers(0, 3), st.integers(0, 31))
def test_any_flipped_bit_stops_the_run(at, bit):
    with pytest.raises(AlignmentError) as caught:
        check(VALUES, flipped(at, bit), *LAYOUT, "fail", 1)
    assert caught.value.mismatch.position == LAYOUT[1][at]


def test_the_line_says_where_what_and_how_many():
    with pytest.raises(AlignmentError) as caught:
        check(VALUES, flipped(3, 0), *LAYOUT, "fail", 12)
    assert str(caught.value) == (
        "step 12: sample 3, position 41, token 198: log-prob of the trainer -0.5 (0xbf000000) "
        "and of the rollout -0.50000006 (0xbf000001) differ; 1 of 4 response tokens differ"
    )


def test_the_line_names_the_rank_that_computed_the_sample():
    by = {2: "trainer rank 0 (10.0.0.1)", 3: "trainer rank 1 (10.0.0.2)"}
    with pytest.raises(AlignmentError, match=r"tokens differ; the trainer's is of trainer rank 1 \(10.0.0.2\)$"):
        check(VALUES, flipped(3, 0), *LAYOUT, "fail", 12, by)


def test_warn_prints_the_same_line_and_returns_the_mismatch(capsys):
    mismatch = check(VALUES, flipped(3, 0), *LAYOUT, "warn", 12)
    with pytest.raises(AlignmentError) as caught:
        check(VALUES, flipped(3, 0), *LAYOUT, "fail", 12)
    assert capsys.readouterr().err == f"{caught.value}\n"
    assert mismatch == caught.value.mismatch


def test_zeros_of_both_signs_stop_the_run():
    zeros = np.zeros(4, np.float32)
    with pytest.raises(AlignmentError, match=r"0x00000000.*0x80000000.*4 of 4"):
        check(zeros, -zeros, *LAYOUT, "fail", 0)


def test_the_error_survives_a_process_boundary():
    with pytest.raises(AlignmentError) as caught:
        check(VALUES, flipped(0, 3), *LAYOUT, "fail", 0)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and copy.mismatch == caught.value.mismatch


def test_a_contrast_run_goes_on_and_keeps_the_place(capsys):
    mismatch = check(VALUES, flipped(3, 0), *LAYOUT, "record", 12)
    assert (mismatch.sample, mismatch.position, mismatch.token) == (3, 41, 198)
    assert capsys.readouterr() == ("", "")


def test_an_unknown_policy_is_an_error_even_when_all_is_equal():
    with pytest.raises(ValueError, match=r"align\.policy=maybe: must be fail or warn"):
        check(VALUES, VALUES, *LAYOUT, "maybe", 0)
