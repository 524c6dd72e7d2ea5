"""Question-answer files: how they are read, and how an answer is judged."""

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.compose import check
from rl.data import Source, open_source
from rl.data.answer import same_answer
from tests.rl.command import GSM8K

RECORDS = [(f"What is {i} and {i + 1}?", f"They are {i}+{i + 1}={2 * i + 1}\n#### {2 * i + 1}") for i in range(64)]


def write_jsonl(path: Path, records: list[tuple[str, str]] = RECORDS, **more: object) -> Path:
    rows = [{"question": q, "answer": a} | more for q, a in records]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def load(path: Path, *overrides: str) -> Source:
    return open_source(check(["data=gsm8k", f"data.path={path}", "data.vocab_size=300", *overrides])[0])


def contents(source: Source) -> list[tuple]:
    return [(p.prompt, p.answer, p.solution, p.prompt_ids) for p in (*source.train, *source.held_out)]


def test_folder_and_file_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for folder in ("lines", "columns"):
        (tmp_path / folder).mkdir()
    for name, records in (("train", RECORDS[:48]), ("test", RECORDS[48:])):
        write_jsonl(tmp_path / "lines" / f"{name}.jsonl", records)
        table = pyarrow.table(
            {"answer": [a for _, a in records], "n": [1] * len(records), "question": [q for q, _ in records]}
        )
        pyarrow.parquet.write_table(table, tmp_path / "columns" / f"{name}.parquet")
    lines, columns = load(tmp_path / "lines"), load(tmp_path / "columns")
    assert contents(lines) == contents(columns)
    assert (len(lines.train), len(lines.held_out)) == (48, 16)
    assert lines.train[3].prompt == f"Question: {RECORDS[3][0]}\nAnswer:" and lines.train[3].answer == "7"

    whole = load(write_jsonl(tmp_path / "all.jsonl"))
    assert len(whole.train) + len(whole.held_out) == 64 and len(whole.held_out) > 1
    assert not {p.prompt for p in whole.train} & {p.prompt for p in whole.held_out}


def test_repeated_question_is_on_one_side(tmp_path: Path) -> None:
    whole = load(write_jsonl(tmp_path / "all.jsonl", RECORDS * 2))
    assert not {p.prompt for p in whole.train} & {p.prompt for p in whole.held_out}


def test_problems_know_their_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl")
    path.write_text("\n\n" + path.read_text())  # blank lines count
    source = load(path)
    ids = {p.prompt: p.id for p in (*source.train, *source.held_out)}
    assert ids[f"Question: {RECORDS[0][0]}\nAnswer:"] == "all.jsonl:3"


@pytest.mark.parametrize("end", ["\r\n", "\n\n", ""])
def test_line_ends(tmp_path: Path, end: str) -> None:
    path = write_jsonl(tmp_path / "all.jsonl")
    expected = contents(load(path))
    text = path.read_text().rstrip("\n")
    path.write_bytes((text.replace("\n", end or "\n") + end).encode())
    assert contents(load(path)) == expected


@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "\x1c", "\x0b", "\u00a0", "😀"])
def test_only_a_newline_ends_a_line(tmp_path: Path, odd: str) -> None:
    records = [(q + odd, a) for q, a in RECORDS]
    path = write_jsonl(tmp_path / "all.jsonl", records)
    source = load(path)
    assert {p.prompt for p in (*source.train, *source.held_out)} == {f"Question: {q}\nAnswer:" for q, _ in records}


def test_other_fields_do_not_matter(tmp_path: Path) -> None:
    """Not even where their types differ from line to line."""
    path = tmp_path / "all.jsonl"
    kinds = [1, "x", None, [1], {"a": 1}, 2.5]
    rows = [{"question": q, "answer": a, "meta": kinds[i % 6]} for i, (q, a) in enumerate(RECORDS)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert contents(load(path)) == contents(load(write_jsonl(tmp_path / "plain.jsonl")))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl")
    first = contents(load(path))
    write_jsonl(path, [(q.replace("What", "Thus"), a) for q, a in RECORDS])
    assert contents(load(path)) != first


def test_long_prompts_are_left_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", [*RECORDS, ("word " * 400 + "?", "#### 1")])
    source = load(path, "data.max_prompt_tokens=64")
    assert max(len(p.prompt_ids) for p in (*source.train, *source.held_out)) <= 64
    assert len(source.train) + len(source.held_out) == 64


# judging --------------------------------------------------------------------------------------------------------------

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
    "18 " * 5000 + "17",
]


def test_right_and_wrong() -> None:
    assert [t for t in RIGHT[:-1] if not same_answer(t, "18")] == []
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
    assert time.perf_counter() - start < 5


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


@pytest.mark.skipif(not GSM8K.exists(), reason="no GSM8K in ../shared/data/gsm8k")
def test_real_gsm8k() -> None:
    source = load(GSM8K, "data.vocab_size=512", "data.max_prompt_tokens=1000")
    for split, problems in (("train", source.train), ("test", source.held_out)):
        assert len(problems) == len((GSM8K / f"{split}.jsonl").read_text().strip().split("\n")) > 500
    for problem in (*source.train, *source.held_out):
        assert float(problem.answer) == float(problem.solution.rpartition("####")[2].replace(",", ""))
    for problem in source.train[::40]:
        assert source.judge(problem, problem.solution) == 1.0
        wrong = problem.solution.rpartition("####")[0] + f"#### {float(problem.answer) + 1:g}"
        assert source.judge(problem, wrong) == 0.0
        assert source.judge(problem, "") == source.judge(problem, "I do not know.") == 0.0
    text = source.train[0].solution
    assert source.tokenizer.decode(source.encode_solution(source.train[0])) == text
