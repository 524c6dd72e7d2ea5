"""Rewards in processes: nothing that they find depends on how many there are, and whatever one does there can be said."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.data import Problem, Source
from rl.data.tokenizer import of_characters
from rl.errors import UserError
from rl.rewards import pool as pools
from rl.rewards.claim import Claim, Found
from rl.rewards.pool import Pool
from rl.rewards.process import Process
from rl.rewards.worker import Call, Wanted
from tests.rl.rewards.opening import opened, verdicts

PROBLEMS = [Problem(f"p{i}", f"{i}=", (i,), str(i), str(i), {"row": i}) for i in range(40)]

TRICKS = '''
import asyncio, os, signal, sys, time


def does(problem, text):
    """Does what the text says."""
    match text:
        case "exit": os._exit(3)
        case "leave": sys.exit("on purpose")
        case "crash": os.kill(os.getpid(), signal.SIGSEGV)
        case "hang": time.sleep(600)
        case "raise": raise KeyError("boom")
        case "slowly": time.sleep(1.5); raise KeyError("slow")
        case "fork":
            if os.fork() == 0: time.sleep(20)
            os._exit(4)
    return float(len(text))


async def later(problem, text):
    await asyncio.sleep(600 if text == "wait" else 0.001 * (problem.record["row"] % 3))
    return does(problem, text)


def group(completions, row, **columns):
    return [len(c) + 100.0 * r + 10.0 * len(completions) for c, r in zip(completions, row, strict=True)]


def pause(problem, text):
    time.sleep(float(text))
    return os.getpid()
'''


@pytest.fixture(scope="module")
def tricks(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tricks") / "tricks.py"
    path.write_text(TRICKS)
    return str(path)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(PROBLEMS[:30], PROBLEMS[30:], lambda p, t: float(t == p.answer), of_characters(["0123456789="]))


@pytest.fixture(scope="module")
def of_any_size(tricks: str) -> Iterator[list[Pool]]:
    """Pools of 1 to 3 processes, all of them started."""
    wanted = [Wanted(f"{tricks}:{name}", {}) for name in ("does", "later", "group")]
    found = [Pool(wanted, workers, 300, 300) for workers in (1, 2, 3)]
    for one in found:
        one.grow(3)
    yield found


claims = st.lists(
    st.tuples(st.integers(0, 39), st.sampled_from(["", "a", "bc", "def", "raise"])), min_size=1, max_size=12
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(asked=st.lists(st.tuples(st.integers(0, 2), claims), min_size=1, max_size=20))
def test_what_is_found_does_not_depend_on_the_number_of_processes(of_any_size: list[Pool], asked: list) -> None:
    calls = []
    for function, of_one in asked:
        made = tuple(Claim(PROBLEMS[of_one[0][0]], text) for _, text in of_one)
        calls += [Call(2, made)] if function == 2 else [Call(function, (claim,)) for claim in made]
    expected = [[_expected(call, claim) for claim in call.claims] for call in calls]
    for one in of_any_size:
        assert one(calls, until_error=False) == expected
        until = next((i for i, found in enumerate(expected) if found[0].error), len(expected) - 1)
        assert one(calls, until_error=True) == expected[: until + 1]


def _expected(call: Call, claim: Claim) -> Found:
    if call.function == 2:
        return Found(len(claim.text) + 100.0 * claim.problem.record["row"] + 10.0 * len(call.claims))
    return Found(error="raised KeyError: 'boom'") if claim.text == "raise" else Found(float(len(claim.text)))


HOW = {
    "exit": r"ended its process \(exit code 3\)",
    "leave": "raised SystemExit: on purpose",
    "crash": r"ended its process \(signal 11, Segmentation fault\)",
    "fork": r"ended its process \(exit code 4\)",
    "raise": "raised KeyError: 'boom'",
    "hang": r"took more than 4 s \(scoring.timeout; a clock decides that, and another machine may be faster\)",
    "wait": r"took more than 4 s \(scoring.timeout; a clock decides that, and another machine may be faster\)",
}


@pytest.mark.parametrize("function", ["does", "later"])
def test_what_one_call_does_costs_that_call(source: Source, tricks: str, function: str) -> None:
    """Async ones too, which share a process while they wait."""
    told: list[str] = []
    reward = opened(source, f"{tricks}:{function}", told.append, errors="drop", timeout=4)
    bad = [how for how in HOW if how != "wait" or function == "later"]
    texts = [text for how in bad for text in ("a", how)] + ["b"] * 5
    found = verdicts(reward, PROBLEMS[: len(texts)], texts)
    for i, (text, verdict) in enumerate(zip(texts, found, strict=True)):
        if text in HOW:
            said = f"the reward {function} {HOW[text]}; problem 'p{i}', completion '{text}'"
            assert verdict.reward is None and verdict.parts == {} and re.fullmatch(said, verdict.error), verdict.error
        else:
            assert verdict.reward == 1.0 and verdict.parts == {function: 1.0} and not verdict.error
    (line,) = told
    assert line == f"{found[1].error}: left out (scoring.errors=drop), as all that follow; reward/errors counts them"
    assert [v.reward for v in verdicts(reward, PROBLEMS[:2], ["raise", "ok"])] == [None, 2.0] and len(told) == 1


@pytest.mark.parametrize("function", ["does", "later"])
@pytest.mark.parametrize("how", sorted(set(HOW) - {"wait", "leave"}))
def test_an_error_ends_the_run_with_the_first_sample_that_it_has(
    source: Source, tricks: str, function: str, how: str
) -> None:
    """The first in the order of the samples, not the first that was noticed."""
    reward = opened(source, f"{tricks}:{function}", timeout=4)
    texts = ["a", "slowly", "b", how, "raise", "hang"]
    with pytest.raises(
        UserError, match=f"the reward {function} raised KeyError: 'slow'; problem 'p1', completion 'slow"
    ):
        verdicts(reward, PROBLEMS[:6], texts)
    with pytest.raises(UserError, match=f"{HOW[how]}; problem 'p2', completion '{how}'"):
        verdicts(reward, PROBLEMS[:3], ["a", "b", how])


def test_all_calls_together_have_a_limit(source: Source, tricks: str) -> None:
    reward = opened(source, f"{tricks}:does", errors="drop", total=8)
    found = verdicts(reward, PROBLEMS[:6], ["a", "hang", "hang", "hang", "hang", "b"])
    assert [v.reward for v in found[:5]] == [1.0, None, None, None, None]
    assert "was not done within 8 s of its batch (scoring.total; a clock decides that)" in found[4].error
    assert [v.reward for v in verdicts(reward, PROBLEMS[:2], ["a", "b"])] == [1.0, 1.0]


def test_processes_are_started_when_there_is_work(tricks: str) -> None:
    pool = Pool([Wanted(f"{tricks}:pause", {})], 2, 300, 300)
    quick, slow = (Call(0, (Claim(PROBLEMS[0], text),)) for text in ("0", "0.3"))
    pool([quick] * 5, until_error=True)
    assert len(pool.ready) == 1 and not pool.loading
    pids = {found.value for (found,) in pool([slow] * 40, until_error=True)}
    assert len(pids) == 2 and os.getpid() not in pids


def test_a_long_call_is_told(
    source: Source, tricks: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pools, "_PATIENCE", 0.5)
    verdicts(opened(source, f"{tricks}:pause"), PROBLEMS[3:4], ["2.5"])
    assert re.search(r"^still waiting for the reward of problem 'p3' \(\d s\)$", capsys.readouterr().out, re.MULTILINE)


def test_a_file_is_imported_with_what_lies_beside_it(source: Source, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("import math\n")
    (tmp_path / "mine.py").write_text("import beside\ndef f(problem, text): return beside.math.sqrt(len(text))\n")
    assert verdicts(opened(source, f"{tmp_path}/mine.py:f"), PROBLEMS[:1], ["abcd"])[0].reward == 2.0


def test_files_may_have_any_name(source: Source, tmp_path: Path) -> None:
    """That of a module of Python's, or of each other; one file is imported once."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text(
            "seen = []\n"
            "def f(problem, text): return float(len(seen))\n"
            f"def {folder}(problem, text):\n    import pickle\n    seen.append(text)\n    return float(len(text))\n"
        )
    functions = [f"{tmp_path}/a/json.py:a", f"{tmp_path}/b/json.py:b", f"{tmp_path}/a/../a/json.py:f"]
    reward = opened(source, functions, workers=1)
    assert [v.parts for v in verdicts(reward, PROBLEMS[:2], ["xy", "z"])] == [
        {"a": 2.0, "b": 2.0, "f": 2.0},
        {"a": 1.0, "b": 1.0, "f": 2.0},
    ]


@pytest.mark.parametrize("worker", ["rl.rewards.worker", "rl.environments.worker"])
@pytest.mark.parametrize("function", ["math:sqrt", "no_such_module:f", f"{__name__}:Stays"])
def test_a_process_that_is_let_go_unheard_says_nothing(
    worker: str, function: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its first answer is left unread, as that of a process which was started last and had no more to do; or there is none."""
    for heard in (True, False):
        process = Process([Wanted(function, {})], worker)
        if heard:
            assert process.pipe.poll(120)
        process.close()
        assert process.has_ended
    assert capfd.readouterr().err == ""


class Stays:
    """An environment without tools, that is also a reward which nobody calls."""

    def reset(self, **row: object) -> None:
        pass

    def __call__(self, problem: object, text: str) -> float:
        return 0.0
