"""Code against the tests of its row: what passes, what does not, and what it may not do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rl.data import Problem
from rl.rewards.code import code

ADD = "def add(a, b):\n    return a + b\n"
FIRST = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
STDIN = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}


def judged(text: str, tests: Any, **args: Any) -> float:
    return code(Problem("p", "", (), "", "", {"tests": tests}), text, **args)["score"]


@pytest.mark.parametrize(
    ("text", "tests", "right"),
    [
        (ADD, FIRST, True),
        (f"Let me see:\n```python\nadd = None\n```\nNo:\n```python\n{ADD}```\nDone.", FIRST, True),
        (ADD, "\n".join(FIRST), True),
        (ADD, json.dumps(FIRST), True),
        (ADD, {"fn_name": "add", "inputs": [[1, 2], ["a", "b"]], "outputs": [3, "ab"]}, True),
        ("print(sum(map(int, input().split())))", STDIN, True),
        ("print(sum(map(int, open(0).read().split())))", json.dumps(STDIN), True),
        ("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))\nsys.exit()", STDIN, True),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", STDIN, True),
        (ADD + "if __name__ == '__main__':\n    raise SystemExit", FIRST, True),
        ("def add(a, b):\n    return 3\n", FIRST, False),
        ("print(3)", STDIN, False),
        ("print(sum(map(int, input().split()))); raise SystemExit(1)", STDIN, False),
        ("def add(a, b:", FIRST, False),
        ("", FIRST, False),
        (ADD + "import sys; sys.exit(0)", FIRST, False),
        (ADD + "import os; os._exit(0)", FIRST, False),
        ("x = [0] * (1 << 30)\n" + ADD, FIRST, False),
        ("import threading, socket\nsocket.socket()\n" + ADD, FIRST, False),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')\n" + ADD, FIRST, False),
        ("import subprocess\nsubprocess.run(['true'])\n" + ADD, FIRST, False),
        ("import os\nos.fork()\n" + ADD, FIRST, False),
        ("print('x' * (1 << 25))\n" + ADD, FIRST, False),
        ("open('mine', 'w').write('x')\n" + ADD, FIRST, True),
        ("assert {'b', 'a', 'c', 'd', 'e'} and __import__('random').random() < 1\n" + ADD, FIRST, True),
    ],
)
def test_programs(text: str, tests: Any, right: bool) -> None:
    assert judged(text, tests) == float(right)


def test_a_share(tmp_path: Path) -> None:
    assert judged("def add(a, b):\n    return 3\n", FIRST, partial=True) == 0.5
    assert judged("def add(a, b):\n    return 3\n", FIRST) == 0.0


def test_time_is_never_a_silent_zero() -> None:
    """CPU time, and time of waiting."""
    for text in ("while True: pass", "import time\ntime.sleep(60)"):
        with pytest.raises(TimeoutError, match=r"more than 1 s .args.seconds; args.late says what that earns"):
            judged(text, FIRST, seconds=1)
        assert judged(text, FIRST, seconds=1, late=-0.5) == -0.5


def test_it_cannot_write_elsewhere_nor_see_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    target = tmp_path / "there"
    target.write_text("before")
    for line in (
        f"open({str(target)!r}, 'w')",
        f"import os; os.remove({str(target)!r})",
        f"open({str(target)!r}, 'a')",
    ):
        assert judged(f"{line}\n{ADD}", FIRST) == 0.0 and target.read_text() == "before"
    assert judged(f"import os\nassert 'SECRET_KEY' not in os.environ\n{ADD}", FIRST) == 1.0
    assert os.environ["SECRET_KEY"] == "x"


def test_the_same_program_does_the_same() -> None:
    """The order of a set, and random numbers."""
    program = "import random; {} print(list(set('abcdefgh')), hash('a'), random.random())"
    here = [sys.executable, "-c", program.format("random.seed(0);")]
    expected = subprocess.run(here, env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True, check=True).stdout
    assert judged(program.format(""), {"inputs": ["", ""], "outputs": [expected, expected]}) == 1.0


@pytest.mark.parametrize("tests", [None, 3, [], [1], {"inputs": []}, {"inputs": ["1"], "outputs": []}])
def test_rows_without_tests(tests: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"test|zip"):
        judged(ADD, tests)


def test_a_row_without_the_field() -> None:
    row = Problem("p", "", (), "", "", {"tests": FIRST, "of": {"it": FIRST}})
    assert code(row, ADD, tests="of.it")["score"] == 1.0
    with pytest.raises(KeyError, match=r"no field 'of.that'; 'that' is not among it"):
        code(row, ADD, tests="of.that")
