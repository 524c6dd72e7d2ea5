"""A run's reward: a user's function in a process of its own, and the gold solutions that it judges first."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl.data import Problem, Source
from rl.data.tokenizer import of_characters
from rl.errors import UserError
from rl.rewards.golds import check_golds
from rl.rewards.process import UserFunction
from rl.rewards.reward import Reward, open_reward
from tests.rl.command import ROOT

PROBLEMS = [Problem(f"rows:{i}", f"{i}=", (i,), str(i), f"it is {i}", {"where": i}) for i in range(100)]


@pytest.fixture(scope="module")
def source() -> Source:
    tokenizer = of_characters(["0123456789= its"])
    return Source(PROBLEMS[:90], PROBLEMS[90:], lambda p, t: float(t.endswith(p.answer)), tokenizer)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return True
    return False


def test_the_users_function(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found where this process finds it; it sees the problem whole, and is another process."""
    assert open_reward(None, source).judge is source.judge
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def f(problem, text): return len(text) + problem.record['where'] / 4\n"
        "def pid(problem, text): return os.getpid()\n"
        "broken = 3\n"
    )
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "fails.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit()\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = open_reward("mine:f", source)
    assert [mine(PROBLEMS[1], text) for text in ("abc", "", "\ud7ff\n")] == [3.25, 0.25, 2.25]
    assert open_reward("mine:pid", source)(PROBLEMS[0], "") != os.getpid()
    for name in ("mine:g", "mine", ":f", "", "wrong:f", "fails:f", "no.such:f", "leaves:f", "dies:f"):
        with pytest.raises(UserError, match="reward"):
            open_reward(name, source)
    broken = open_reward("mine:broken", source)
    with pytest.raises(UserError, match="TypeError: 'int' object is not callable; problem 'rows:3', completion 'x'"):
        broken(PROBLEMS[3], "x")


def test_its_process_ends_with_the_run() -> None:
    function = UserFunction("tests.rl.command:length")
    pid = function._process.pid
    assert function(PROBLEMS[0], "four") == 4.0 and alive(pid)
    del function
    assert not alive(pid)


def test_its_process_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """Also in the middle of a call."""
    (tmp_path / "hangs.py").write_text("import time\ndef f(problem, text): time.sleep(600)\n")
    script = (
        "import os, signal, sys, threading, time\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "from rl.data import Problem\n"
        "from rl.rewards.process import UserFunction\n"
        "f = UserFunction('hangs:f')\n"
        "threading.Thread(target=f, args=(Problem('p', '', (), '', '', None), ''), daemon=True).start()\n"
        "time.sleep(1)\n"
        "print(f._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    pid, end = int(done.stdout), time.monotonic() + 20
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(pid), done


def test_golds(source: Source) -> None:
    """All of them by the data's own verifier; some, and only as a warning, by the user's."""

    def right_from(first: int) -> Reward:
        return Reward("math", lambda p, t: float(int(p.answer) >= first and t.endswith(p.answer)), of_user=False)

    assert check_golds(source, right_from(0), by_tokens=False) == ""
    line = check_golds(source, right_from(3), by_tokens=False)
    assert line == ("3 of 100 golds do not earn 1 by math, first: rows:0: the answer is '0', and 'it is 0' earns 0")
    with pytest.raises(UserError, match="100 of 100 golds do not earn 1 by math, first: rows:0"):
        check_golds(source, right_from(100), by_tokens=False)
    seen: list[str] = []
    users = Reward("reward=m:f", lambda p, t: seen.append(t) or -0.5, of_user=True)
    assert "50 of 50 golds do not earn 1 by reward=m:f" in check_golds(source, users, by_tokens=False)
    assert seen[0] == "" and len(seen) == 51


def test_golds_are_judged_as_the_tokenizer_says_them(source: Source) -> None:
    """As a completion is: a tokenizer that cannot say an answer is found out."""
    whole = Reward("text", lambda p, t: float(t == p.solution), of_user=False)
    assert check_golds(source, whole, by_tokens=True) == ""
    poor = Source(source.train, source.held_out, source.judge, of_characters(["12345678= its"]))
    line = check_golds(poor, whole, by_tokens=True)
    assert line.startswith("28 of 100 golds do not earn 1 by text, first: rows:0: the answer is '0'")
