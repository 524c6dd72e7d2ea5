"""A run's reward: a user's function in a process of its own, and the gold solutions that it judges first."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl.data import Judge, Problem, Source
from rl.data.tokenizer import of_characters
from rl.errors import UserError
from rl.rewards.claim import Claim, Found
from rl.rewards.golds import check_golds
from rl.rewards.pool import Pool
from rl.rewards.reward import Part, Reward, WeightedSum
from rl.rewards.worker import Call, Wanted
from tests.rl.command import ROOT
from tests.rl.rewards.opening import earned, opened

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
    mine = opened(source, "mine:f")
    assert earned(mine, PROBLEMS[1], "abc", "", "\ud7ff\n") == [3.25, 0.25, 2.25]
    assert earned(opened(source, str(tmp_path / "mine.py:f")), PROBLEMS[1], "abc") == [3.25]
    assert earned(opened(source, "mine:pid"), PROBLEMS[0], "") != [os.getpid()]
    for name in (
        "mine:g",
        "mine",
        ":f",
        "mine:",
        "wrong:f",
        "fails:f",
        "no.such:f",
        "leaves:f",
        "mine:broken",
        "no/mine.py:f",
    ):
        with pytest.raises(UserError, match="reward="):
            opened(source, name)
    with pytest.raises(UserError, match=r"reward='fails:g' .*ZeroDivisionError"):
        opened(source, ["mine:f", "fails:g"])
    with pytest.raises(UserError, match=r"reward='mine:f', 'dies:g' .*ended its process"):
        opened(source, ["mine:f", "dies:g"])
    with pytest.raises(UserError, match=r"reward='dies:f' .*ended its process \(exit code 0\)"):
        opened(source, "dies:f")


def test_its_process_ends_with_the_run(source: Source) -> None:
    pool = Pool([Wanted("tests.rl.command:length", {})], 2, 300, 300)
    (pid,) = (process.pid for process in pool.ready)
    assert pool([Call(0, (Claim(PROBLEMS[0], "four"),))], until_error=True) == [[Found(4.0)]] and alive(pid)
    del pool
    assert not alive(pid)


def test_its_process_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    """Also in the middle of a call, and with what the call has started."""
    (tmp_path / "hangs.py").write_text(
        "import subprocess\ndef f(problem, text):\n"
        f"    child = subprocess.Popen(['sleep', '600'])\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "    child.wait()\n"
    )
    script = (
        "import os, pathlib, signal, sys, threading, time\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]\n"
        "from rl.data import Problem\n"
        "from rl.rewards.claim import Claim\n"
        "from rl.rewards.pool import Pool\n"
        "from rl.rewards.worker import Call, Wanted\n"
        "pool = Pool([Wanted('hangs:f', {})], 1, 600, 600)\n"
        "calls = [Call(0, (Claim(Problem('p', '', (), '', '', None), ''),))]\n"
        "threading.Thread(target=pool, args=(calls, True), daemon=True).start()\n"
        f"while not (pid := pathlib.Path({str(tmp_path / 'pid')!r})).exists() or not pid.read_text(): time.sleep(0.05)\n"
        "print(pool.ready[0].pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    pids, end = [int(done.stdout), int((tmp_path / "pid").read_text())], time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, pids)), done


def made(name: str, judge: Judge, of_user: bool) -> Reward:
    return Reward(name, WeightedSum([Part("part", 1.0, judge)]), of_user)


def test_golds(source: Source) -> None:
    """All of them by the data's own verifier; some, and only as a warning, by the user's."""

    def right_from(first: int) -> Reward:
        return made("math", lambda p, t: float(int(p.answer) >= first and t.endswith(p.answer)), of_user=False)

    assert check_golds(source, right_from(0), by_tokens=False) == ""
    line = check_golds(source, right_from(3), by_tokens=False)
    assert line == ("3 of 100 golds do not earn 1 by math, first: rows:0: the answer is '0', and 'it is 0' earns 0")
    with pytest.raises(UserError, match="100 of 100 golds do not earn 1 by math, first: rows:0"):
        check_golds(source, right_from(100), by_tokens=False)
    seen: list[str] = []
    users = made("reward=m:f", lambda p, t: seen.append(t) or -0.5, of_user=True)
    assert "50 of 50 golds do not earn 1 by reward=m:f" in check_golds(source, users, by_tokens=False)
    assert seen[0] == "" and len(seen) == 51
    silent = made("reward=m:f", lambda p, t: None, of_user=True)
    with pytest.raises(UserError, match="reward=m:f leaves all 50 golds out: it returns None"):
        check_golds(source, silent, by_tokens=False)
    unsure = made("reward=m:f", lambda p, t: None if p.answer == "2" else 1.0, of_user=True)
    line = check_golds(source, unsure, by_tokens=False)
    assert line.startswith(
        "1 of 50 golds do not earn 1 by reward=m:f, first: rows:2: the answer is '2', and 'it is 2' is left"
    )


def test_golds_are_judged_as_the_tokenizer_says_them(source: Source) -> None:
    """As a completion is: a tokenizer that cannot say an answer is found out."""
    whole = made("text", lambda p, t: float(t == p.solution), of_user=False)
    assert check_golds(source, whole, by_tokens=True) == ""
    poor = Source(source.train, source.held_out, source.judge, of_characters(["12345678= its"]))
    line = check_golds(poor, whole, by_tokens=True)
    assert line.startswith("28 of 100 golds do not earn 1 by text, first: rows:0: the answer is '0'")
