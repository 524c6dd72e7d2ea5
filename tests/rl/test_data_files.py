"""Question-answer files: how they are read, and what is refused or warned of."""

import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rl.command_line import quoted
from rl.compose import check
from rl.config import validate
from rl.data import Source, open_source
from rl.data import tokenizer as tokenizers
from rl.errors import UserError
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


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(path, *overrides)
    return str(error.value)


@pytest.mark.parametrize("template", ["Answer:", "{{question}}", "\\n", "{{0}} {{1}}"])
def test_a_template_that_makes_prompts_alike(tmp_path: Path, template: str) -> None:
    line = refused(write_jsonl(tmp_path / "all.jsonl"), f"data.prompt='{template}'")
    assert "makes every prompt alike: it uses no field, and may use {question}" in line


def test_a_template_that_asks_for_an_attribute(tmp_path: Path) -> None:
    """A method's text holds an address: every prompt its own, and in each process another."""
    line = refused(write_jsonl(tmp_path / "all.jsonl"), "data.prompt='{question.upper}'")
    assert "'question.upper' is an attribute" in line and "it may use {question}" in line


def test_a_template_that_loses_what_tells_problems_apart(tmp_path: Path) -> None:
    line = refused(write_jsonl(tmp_path / "all.jsonl"), "data.prompt='{question[0]}'")
    assert "makes one prompt of two problems with different answers: 'W' of 'all.jsonl:" in line


def test_questions_with_two_answers_are_told(tmp_path: Path) -> None:
    assert load(write_jsonl(tmp_path / "all.jsonl")).warnings == ()
    again = [(RECORDS[0][0], "#### 2"), RECORDS[1], (RECORDS[2][0], "#### 2")]
    (line,) = load(write_jsonl(tmp_path / "all.jsonl", [*RECORDS, *again])).warnings
    assert line == "2 questions are asked again with another answer, first: all.jsonl:1 ('1') and all.jsonl:65 ('2')"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (r"Q: {question}\nA:", "Q: {question}\nA:"),
        (r"{question}\n\n\tanswer:", "{question}\n\n\tanswer:"),
        (r"{question} \nabla \neq \text x \times \tau", r"{question} \nabla \neq \text x \times \tau"),
        (r"\boxed {question} \r", r"\boxed {question} \r"),
        (r"{question}\\n", r"{question}\\n"),
        ("{question}\nA:", "{question}\nA:"),
    ],
)
def test_a_typed_line_break(tmp_path: Path, typed: str, read: str) -> None:
    """A shell leaves it as two characters. Read once or twice, it is the same: a run reads its own config again."""
    (config,) = check(["data=gsm8k", "data.path=x", quoted("data.prompt", typed)])
    assert config.data.prompt == read == validate(config.model_dump(mode="json")).data.prompt


def split(folder: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> Path:
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    return folder


def test_held_out_problems_that_are_trained_on(tmp_path: Path) -> None:
    assert load(split(tmp_path / "apart", RECORDS[:40], RECORDS[40:])).warnings == ()
    (line,) = load(split(tmp_path / "some", RECORDS[:40], RECORDS[38:])).warnings
    assert line == "2 of 26 held-out problems are trained on too, first: test.jsonl:1, which is train.jsonl:39"
    line = refused(split(tmp_path / "all", RECORDS[:40], RECORDS[30:40]))
    assert "all 10 held-out problems are trained on too (first: test.jsonl:1, which is train.jsonl:31)" in line


def test_a_split_in_two_files(tmp_path: Path) -> None:
    folder = split(tmp_path / "two", RECORDS[:40], RECORDS[40:])
    (folder / "train.parquet").write_bytes(b"")
    assert "holds both train.jsonl and train.parquet: remove one" in refused(folder)


@pytest.mark.parametrize("place", ["file", "split", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, place: str) -> None:
    folder = split(tmp_path / "data", RECORDS[:40], RECORDS[40:])
    pipe = tmp_path / "pipe" if place == "file" else folder / "test.jsonl"
    pipe.unlink(missing_ok=True)
    if place == "device":
        pipe.symlink_to("/dev/zero")
    elif place == "folder":
        pipe.mkdir()
    else:
        os.mkfifo(pipe)
    assert f"{pipe} is no regular file" in refused(pipe if place == "file" else folder)


LONG = {
    "one letter": "a" * 3_000_000,
    "letters": "".join(random.Random(0).choices("abcdefghij", k=300_000)),
    "line breaks": "\n" * 1_000_000,
    "signs": "=+" * 500_000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("field", ["question", "answer"])
def test_a_row_that_is_very_long(tmp_path: Path, text: str, field: str) -> None:
    """It takes seconds, and where it is left out it leaves no mark on the tokenizer."""
    long = (text, "#### 1") if field == "question" else ("How long?", f"{text} #### 1")
    plain = load(write_jsonl(tmp_path / "all.jsonl", RECORDS), "data.vocab_size=1024")
    start = time.perf_counter()
    source = load(write_jsonl(tmp_path / "all.jsonl", [*RECORDS, long]), "data.vocab_size=1024")
    assert time.perf_counter() - start < 100
    if field == "question":
        assert source.left_out == 1 and source.tokenizer.backend.get_vocab() == plain.tokenizer.backend.get_vocab()
        assert contents(source) == contents(plain)
    else:
        assert source.left_out == 0


def test_a_long_start_says_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rl.run.screen.FIRST", 0.05)
    monkeypatch.setattr("rl.run.screen.NEXT", 0.05)
    make = tokenizers.byte_level_bpe

    def slow(*what: Any) -> Any:
        time.sleep(1)
        return make(*what)

    monkeypatch.setattr(tokenizers, "byte_level_bpe", slow)
    path = write_jsonl(tmp_path / "all.jsonl")
    open_source(check(["data=gsm8k", f"data.path={path}"])[0], Console())
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if re.fullmatch(r"making a tokenizer from \d+ problems \(\d+ s\)", line)]
    assert len(told) > 3


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
