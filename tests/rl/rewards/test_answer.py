"""Whether a text states the right answer."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.rewards.answer import plain, same_answer, without_separators

RIGHT = [
    "18",
    " 18",
    "18.",
    "18.0",
    "$18",
    "$18$",
    "\\boxed{18}",
    "18 dollars",
    "36/2",
    "$\\frac{36}{2}$",
    "$2^{4}+2$",
    "1.8e1",
]
WRONG = [
    "",
    " ",
    "17",
    "-18",
    "181",
    "1 8 0",
    "x",
    "18/0",
    "$\\frac{1}{0}$",
    "True",
    "none",
    "####",
    "nan",
    "inf",
    "\x00",
]
HEAVY = [
    "9**9**9**9",
    "9^9^9^9",
    "$9^{9^{9^{9}}}$",
    "\\boxed{10^{10^{10}}}",
    "$2^{1000000000}$",
    "$10^{-1000000000}$",
    "$(((9^{99})^{99})^{99})^{99}$",
    "$99999999!$",
    "$\\binom{1000000}{500000}$",
    "$\\sum_{n=1}^{100000000} n$",
    "$\\prod_{n=1}^{100000000} n^n$",
    "$\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{999999999}$",
    "$e^{e^{e^{9}}}$",
    "$x^x^x$",
    "$(x+y)^{999}$",
    "$\\int_0^1 x^x dx$",
    "9" * 20000,
    "(" * 20000,
    "1+" * 20000 + "1",
    "$\\sqrt{" * 500,
    "\\frac{" * 500,
    "{" * 300 + "}" * 300,
    "$" * 1001,
    "$" + "x^" * 60 + "x$",
    "x^" * 60 + "x",
    "$" + "(" * 60 + "1" + ")" * 60 + "$",
    "(" * 60 + "1" + ")" * 60,
    "|x" * 40 + "|" * 40,
    "x_" * 60 + "x",
    "it is [" + "x^" * 60 + "x] then",
    "18 " * 5000 + "17",
]


def test_right_and_wrong() -> None:
    assert [t for t in RIGHT if not same_answer(t, "18")] == []
    assert [t for t in WRONG if same_answer(t, "18")] == []
    assert (
        same_answer("1,234", "1234")
        and same_answer("-5", "-5")
        and same_answer("0", "0")
        and same_answer("0.50", "0.5")
    )
    assert not same_answer("0", "") and not same_answer("", "0")


@pytest.mark.parametrize("text", HEAVY, ids=[t[:16] for t in HEAVY])
def test_no_text_is_costly(text: str) -> None:
    """No clock decides, so what could take long is refused by what it is."""
    start = time.perf_counter()
    assert same_answer(text, "18") is False
    assert time.perf_counter() - start < 30


GOLDS = {  # gold: (what is the same, what is not)
    "2\\sqrt{3}": (
        ("2\\sqrt{3}", "\\boxed{2\\sqrt{3}}", "$2\\sqrt{3}$", "\\sqrt{12}", "It is $\\sqrt{12}$."),
        ("2", "3", "\\sqrt{3}", "12"),
    ),
    "2": (("2", "\\sqrt{4}", "\\boxed{2}"), ("2\\sqrt{3}", "2\\sqrt{3", "3, 2", "(1, 2)")),
    "3, 4": (("3, 4", "4,3", "$\\{3, 4\\}$", "3 and 4", "\\boxed{3, 4}"), ("3", "4", "34", "3, 5", "3.4")),
    "(0,1)": (("(0,1)", "(0, 1)", "$(0,1)$", "\\left(0,1\\right)"), ("01", "1", "0", "[0,1]", "(1,0)")),
    "1,234": (("1234", "1,234", "$1,234.00", "1234 dollars"), ("1", "234", "1,235", "(1,234)")),
    "(1,234)": (("(1,234)", "(1, 234)"), ("1234", "1,234")),
    "B": (("B", "B.", "(B)", "**B**", "\\boxed{B}", "It is \\boxed{\\text{B}}."), ("A", "b", "", "AB", "\\boxed{A}")),
    "Yes": (("Yes", " Yes\n", "\\text{Yes}"), ("No", "yes", "Yse", "Yes and no", "s e Y")),
    "Paris": (("Paris", "\\boxed{Paris}"), ("Pairs", "London", "\\boxed{Pairs}")),
    "Paris, France": (("Paris, France",), ("Paris", "France, Paris", "Pairs, France")),
    "x^2+1": (("x^2+1", "1+x^2", "$x^{2}+1$", "\\boxed{x^2 + 1}"), ("2", "1", "x^2", "x^2-1", "y^2+1")),
    "2ab+c": (("2ab+c", "c+2ba"), ("2", "2ab")),
    "x=5": (("5", "x=5", "$x = 5$"), ("6", "x=6")),
    "\\frac{1}{2}": (("\\frac12", "1/2", "0.5", "$\\frac{2}{4}$"), ("1", "2", "12")),
    "1e10": (("1e10", "10^{10}", "10000000000"), ("1", "10", "e")),
    "2 1/2": (("2 1/2", "5/2", "2.5", "2  1/2"), ("2", "1/2", "3/2", "1")),
    "1": (("1", "1.0", "3/3"), ("2 1/2", "1 2", "2 1", "1 000", "2 * 1 1")),
    "1000": (("1 000", "1,000", "1000"), ("1", "1 00", "000")),
    "10:30": (("10:30",), ("10", "30", "1030")),
    "50%": (("50%", "50\\%", "50 percent"), ("5", "500")),
    "7 apples": (("7", "7 apples", "seven is 7"), ("8", "apples")),
    "\\binom{5}{2}": (("\\binom{5}{2}", "\\boxed{\\binom{5}{2}}"), ("2", "5")),  # text alone: see _COMMANDS
    "9^9^9^9": (("9^9^9^9",), ("9", "1")),
    "x" * 3000: (("x" * 3000,), ("x", "x" * 2999)),
}


@pytest.mark.parametrize("gold", GOLDS, ids=[g[:16] for g in GOLDS])
def test_golds(gold: str) -> None:
    """Whole or not at all: as LaTeX, as a number with its unit, or as text."""
    right, wrong = GOLDS[gold]
    assert [c for c in right if not same_answer(c, gold)] == []
    assert [c for c in wrong if same_answer(c, gold)] == []


def test_a_box_is_the_claim() -> None:
    """Whatever stands before it, or after."""
    work = "$\\sum_{n=1}^{3} n^2 = 1^2 + 2^2 + 3^2$, so ((((((((14))))))))"
    assert same_answer(f"{work} is \\boxed{{14}}. We are done in 2 steps.", "14")
    assert not same_answer(f"{work} is \\boxed{{15}}, not 14.", "14")
    assert same_answer("\\boxed{x} or rather \\boxed{\\frac{1}{2}}", "0.5")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text(min_size=1, max_size=40) | st.text(alphabet="0123456789,.()[]{}+-*/^$\\ xyAB=%", min_size=1, max_size=20)
)
def test_equal_text_is_right(text: str) -> None:
    assert same_answer(text, text) is bool(plain(text))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=3), st.sampled_from(["()", "[]", "  ", "$$"]))
def test_separators_stand_inside_one_number(numbers: list[int], around: str) -> None:
    text = around[0] + ", ".join(map(str, numbers)) + around[1]
    assert without_separators(text) == text
    tight = around[0] + ",".join(map(str, numbers)) + around[1]
    assert without_separators(tight) == tight or (len(numbers) == 2 and around in ("  ", "$$"))
    for number in numbers:
        for unit in ("", " dollars", "."):
            assert without_separators(f"{number:,}{unit}") == f"{number}{unit}"


@settings(max_examples=150, deadline=10_000, derandomize=True)
@given(st.text(max_size=60) | st.text(alphabet="0123456789^*!+-/(){}[]$\\.,%= xe", max_size=40))
def test_any_text_is_judged(text: str) -> None:
    assert same_answer(text, "18") in (True, False)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(-(10**9), 10**9), st.integers(1, 1000))
def test_integers_are_judged_by_value(n: int, off: int) -> None:
    assert same_answer(f" {n}", str(n)) and same_answer(f"{n:,}", str(n))
    assert not same_answer(str(n + off), str(n))


def test_judge_works_in_a_thread() -> None:
    """Signals, and so the time limits of math-verify, are for the main thread alone."""
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(same_answer("18", "18")))
    thread.start()
    thread.join()
    assert seen == [True]


def test_judging_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for text in (*RIGHT, *WRONG):
        same_answer(text, "18")
    assert capfd.readouterr() == ("", "")
