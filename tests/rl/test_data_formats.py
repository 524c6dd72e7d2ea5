"""Data sets as people have them: each published format in each kind of file, fields, conversations, and what is refused."""

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.compose import check
from rl.config import RunConfig, validate
from rl.data import Source, open_source
from rl.data.__main__ import main
from rl.data.fields import plain_text, value_at
from rl.data.rows import read_rows
from rl.data.tokenizer import byte_level_bpe
from rl.errors import UserError
from rl.identity import ROWS, difference, identity
from rl.keys import renewed
from rl.model import model_config
from rl.prepare import prepare

quick = settings(max_examples=60, deadline=None, derandomize=True)

Row = dict[str, Any]
BASE = check(["data=dataset", "data.path=unused", "data.vocab_size=300", "warmup.steps=1"])[0]


def config(path: object, warmup: int = 1, reward: str | None = None, **keys: object) -> RunConfig:
    """A config as the command line's is made, without Hydra, which takes a second for each."""
    values = BASE.model_dump()
    values["data"] |= {"path": str(path), **keys}
    values["warmup"]["steps"], values["reward"] = warmup, reward
    return validate(values)


def load(path: object, warmup: int = 1, reward: str | None = None, **keys: object) -> Source:
    return open_source(config(path, warmup, reward, **keys))


def refused(path: object, warmup: int = 1, reward: str | None = None, **keys: object) -> str:
    with pytest.raises(UserError) as error:
        load(path, warmup, reward, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(source: Source) -> list[tuple]:
    return sorted((p.prompt, p.prompt_ids, p.answer, p.solution) for p in (*source.train, *source.held_out))


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text: str) -> list[Row]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


# published formats ----------------------------------------------------------------------------------------------------

FORMATS: dict[str, tuple[Callable[[int, str], Row], str]] = {
    "verl": (
        lambda i, q: {
            "data_source": "toy/add",
            "prompt": user(q),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 5)},
            "extra_info": {"split": "train", "index": i},
        },
        "verl's format: question from 'prompt', answer from 'reward_model.ground_truth'",
    ),
    "TRL, messages": (
        lambda i, q: {"prompt": user(q), "answer": str(i + 5), "level": i},
        "TRL's format: question from 'prompt', answer from 'answer'",
    ),
    "TRL, text": (
        lambda i, q: {"prompt": q, "solution": f"It is \\boxed{{{i + 5}}}"},
        "TRL's format: question from 'prompt', answer from 'solution'",
    ),
    "TRL, completion": (
        lambda i, q: {"prompt": user(q), "completion": said(str(i + 5))},
        "TRL's format: question from 'prompt', answer from 'completion'",
    ),
    "OpenRLHF": (
        lambda i, q: {"input": user(q), "label": str(i + 5)},
        "OpenRLHF's format: question from 'input', answer from 'label'",
    ),
    "slime": (
        lambda i, q: {"prompt": user(q), "label": str(i + 5), "metadata": {"id": f"a{i}"}},
        "slime's format: question from 'prompt', answer from 'label'",
    ),
    "messages": (
        lambda i, q: {"messages": [*user(q), *said(str(i + 5))]},
        "question from 'messages', answer from its last message",
    ),
    "numbers": (lambda i, q: {"question": q, "answer": i + 5}, "question from 'question', answer from 'answer'"),
    "MATH": (lambda i, q: {"problem": q, "answer": float(i + 5)}, "question from 'problem', answer from 'answer'"),
}


def rows_of(name: str, start: int = 0, stop: int = 40) -> list[Row]:
    return [FORMATS[name][0](i, f"{i}+5?") for i in range(start, stop)]


def as_lines(folder: Path, rows: list[Row]) -> Path:
    return write(folder / "data.jsonl", rows)


def as_json(folder: Path, rows: list[Row]) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def as_json_lines(folder: Path, rows: list[Row]) -> Path:
    return write(folder / "data.json", rows)


def as_parquet(folder: Path, rows: list[Row]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


def as_saved(folder: Path, rows: list[Row]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def as_splits(folder: Path, rows: list[Row]) -> Path:
    parts = {"train": rows[:30], "test": rows[30:]}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})
    saved.save_to_disk(folder / "splits")
    return folder / "splits"


def as_shards(folder: Path, rows: list[Row]) -> Path:
    """As a repository on the hub has them, cloned."""
    (folder / "clone" / "data").mkdir(parents=True)
    for i, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")):
        table = pyarrow.Table.from_pylist(rows[10 * i : 10 * i + 10] if i < 2 else rows[20:])
        pyarrow.parquet.write_table(table, folder / "clone" / "data" / f"{name}.parquet")
    return folder / "clone"


KINDS = (as_json, as_json_lines, as_parquet, as_saved, as_splits, as_shards)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_loads_as_it_is(tmp_path: Path, name: str) -> None:
    """What is asked and what is right: the same of every format, and from every kind of file."""
    rows, told = rows_of(name), FORMATS[name][1]
    chat = "messages" in name or isinstance(rows[0].get("prompt", rows[0].get("input")), list)
    keys = {"chat_template": "plain"} if chat else {}
    source = load(as_lines(tmp_path, rows), **keys)
    assert source.about == (told,)
    problems = {p.id: p for p in (*source.train, *source.held_out)}
    assert len(problems) == 40
    for i, row in enumerate(rows):
        problem = problems[f"data.jsonl:{i + 1}"]
        assert problem.prompt == (f"user:\n{i}+5?\nassistant:\n" if chat else f"{i}+5?")
        assert (problem.messages == user(f"{i}+5?")) if chat else problem.messages is None
        assert problem.answer == str(i + 5) and problem.record == row
        assert source.judge(problem, f"I think it is {i + 5}.") == 1.0 and source.judge(problem, str(i + 6)) == 0.0
    for kind in KINDS:
        other = load(kind(tmp_path, rows), **keys, vocab_size=258)
        assert other.about == (told,), kind
        plain = load(as_lines(tmp_path, rows), **keys, vocab_size=258)
        assert contents(other) == contents(plain), kind
        assert len(other.held_out) == {as_splits: 10, as_shards: 20}.get(kind, len(plain.held_out)), kind


def test_csv_holds_texts(tmp_path: Path) -> None:
    """007 stays 007, and NA is no number that is missing."""
    path = tmp_path / "data.csv"
    rows = [(f'Who is "{i}",\nand why?', "007" if i % 2 else "NA", "") for i in range(200)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("question", "answer", "note"), *rows])
    source = load(path)
    problems = {p.id: p for p in (*source.train, *source.held_out)}
    assert len(problems) == 200 and {p.answer for p in problems.values()} == {"007", "NA"}
    first = problems["data.csv:3"]  # the line that it ends in
    assert first.prompt == rows[0][0] and first.record == {"question": rows[0][0], "answer": "NA", "note": ""}
    (tmp_path / "data.tsv").write_text("question\tanswer\n" + "".join(f"{i}?\t0{i}\n" for i in range(200)))
    assert load(tmp_path / "data.tsv").train[0].answer == "00"


texts = st.text(st.characters(codec="utf-8"), max_size=8)


@quick
@given(
    st.lists(texts, min_size=1, max_size=3, unique=True).flatmap(
        lambda names: st.lists(st.fixed_dictionaries({name: texts for name in names}), min_size=1, max_size=4)
    )
)
def test_rows_are_the_same_in_every_kind_of_file(rows: list[Row]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [kind(Path(folder), rows) for kind in (as_lines, as_parquet)]
        assert all([row.record for row in read_rows(path)] == rows for path in paths)
        assert [row.record for row in read_rows(as_json(Path(folder), rows))] == rows
        for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
            path = Path(folder) / f"data{suffix}"
            with open(path, "w", newline="", encoding="utf-8") as file:
                lines = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
                lines.writerows([list(rows[0]), *([row[name] for name in rows[0]] for row in rows)])
            assert [row.record for row in read_rows(path)] == rows


BAD = {
    "short line": ("data.csv", "question,answer\n1?,1\n\n2?\n", "data.csv:4: 1 values, and the first line names 2 col"),
    "twice": ("data.csv", "question,question\n1,1\n", "data.csv:1: two columns have one name"),
    "open quote": ("data.csv", 'question,answer\n1,"1\n', "not CSV in UTF-8"),
    "not UTF-8": ("data.csv", "question,answer\n1,\udcff\n", "not CSV in UTF-8"),
    "only names": ("data.csv", "question,answer\n", "data.csv is empty"),
    "empty list": ("data.json", "[]", "data.json is empty"),
    "open list": ("data.json", '[{"question": "1"},\n{', "data.json:2: not a JSON object"),
    "list of texts": ("data.json", '["a", "b"]', "data.json:1: not a JSON object"),
    "a text": ("data.jsonl", '"a"\n', "data.jsonl:1: not a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_cannot_be_read(tmp_path: Path, case: str) -> None:
    name, text, part = BAD[case]
    (tmp_path / name).write_text(text, errors="surrogateescape")
    assert part in refused(tmp_path / name)


# fields ---------------------------------------------------------------------------------------------------------------


def test_fields_that_may_each_be_meant(tmp_path: Path) -> None:
    row = {"question": "1?", "prompt": "1?", "answer": 1, "solution": "1"}
    path = write(tmp_path / "data.jsonl", [row] * 9)
    line = refused(path)
    assert line == (
        f"{path}:1: prompt and question may each be the question: set data.question=FIELD; the fields are question, prompt, "
        f"answer, solution"
    )
    assert "answer and solution may each be the answer: set data.answer=FIELD" in refused(path, question="prompt")
    line = refused(write(path, [{"frage": "1?", "antwort": "1"}]))
    assert "no field is known as the question: set data.question=FIELD; the fields are frage, antwort" in line
    assert "no field is known as the answer: set data.answer=FIELD" in refused(path, question="frage")
    assert "no text field 'frag'; the fields are frage, antwort" in refused(path, question="frag", answer="antwort")


def test_fields_by_their_path(tmp_path: Path) -> None:
    rows = [{"a": {"b": [f"{i}?", "x"]}, "extra_info": {"answer": i}, "d.e": str(i)} for i in range(40)]
    path = write(tmp_path / "data.jsonl", rows)
    deep = load(path, question="a.b.0", answer="extra_info.answer")
    assert contents(deep) == contents(load(path, question="a.b.0", answer="d.e"))
    assert deep.about == () and {p.prompt for p in (*deep.train, *deep.held_out)} == {f"{i}?" for i in range(40)}
    for wrong in ("a.b", "a.b.7", "a.c", "a.b.0.0", "e"):
        assert f"data.jsonl:1: no text field '{wrong}'" in refused(path, question=wrong, answer="d.e")


names = st.text(min_size=1, max_size=4).filter(lambda name: "." not in name)


@quick
@given(st.lists(names | st.integers(0, 3), min_size=1, max_size=5), st.integers())
def test_a_path_leads_to_what_stands_there(parts: list[str | int], leaf: int) -> None:
    value: Any = leaf
    for part in reversed(parts):
        value = [*range(part), value] if isinstance(part, int) else {part: value, part + "x": None}
    record = value if isinstance(value, dict) else {"top": value}
    path = ".".join(map(str, parts if record is value else ["top", *parts]))
    assert value_at(record, path) == leaf


@quick
@given(st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False)))
def test_an_answer_is_the_text_that_json_has(value: Any) -> None:
    text = plain_text(value)
    assert text is not None and json.loads(text) == value and plain_text([value]) == text
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        assert "." not in text


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (
            ["1", "2"],
            "field 'answer' is a list of 2, and an answer is one text or number: set data.answer to a part of it",
        ),
        ({"target": ["1"]}, "(answer.target)"),
        (None, "data.jsonl:9: no text field 'answer'"),
        (float("nan"), "data.jsonl:9: no text field 'answer'"),
        (" ", "data.jsonl:9: the answer is empty (field 'answer')"),
        ([], "data.jsonl:9: no text field 'answer'"),
        ("\ud800", "half a surrogate pair"),
    ],
)
def test_an_answer_that_nothing_can_judge(tmp_path: Path, value: Any, part: str) -> None:
    rows = [{"question": f"{i}?", "answer": value if i == 8 else i} for i in range(40)]
    path = write(tmp_path / "data.jsonl", rows)
    assert part in refused(path)
    if value != "\ud800":
        source = load(path, warmup=0, reward="mine:f")  # which reads the row
        assert len(source.train) + len(source.held_out) == 40


def test_no_answers_where_a_reward_needs_none(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [{"prompt": f"Write {i} lines.", "tag": i} for i in range(40)])
    source = load(path, warmup=0, reward="tests.rl.command:length")
    assert source.about == ("TRL's format: question from 'prompt', no answer",)
    assert {p.answer + p.solution for p in source.train} == {""} and source.train[0].record["tag"] in range(40)
    for warmup, reward in ((1, "tests.rl.command:length"), (0, None), (0, "verifier"), (0, "exact")):
        assert "no field is known as the answer: set data.answer=FIELD" in refused(path, warmup, reward)
    ready = prepare(config(path, 0, "tests.rl.command:length").model_copy(update={"dry_run": True}))
    assert ready.warnings == ()


def test_a_reward_of_the_users_hides_no_mistake(tmp_path: Path) -> None:
    """Answers that are named, or that follow a marker, are there."""
    path = write(tmp_path / "data.jsonl", [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(40)])
    line = refused(path, 0, "mine:f", answer="anwser")
    assert "data.jsonl:1: no text field 'anwser'; the fields are question, answer" in line
    assert "data.jsonl:1: the answer has no '##>' before its result" in refused(path, 0, "mine:f", marker="##>")
    assert load(path, 0, "mine:f", marker="####").train[0].answer != ""


def test_a_template_over_other_fields(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "choices": [i, i + 1], "level": i / 2, "answer": "A"} for i in range(40)]
    path = write(tmp_path / "data.jsonl", rows)
    source = load(path, prompt="{question} A: {choices[0]} B: {choices[1]} ({level})")
    assert "3? A: 3 B: 4 (1.5)" in {p.prompt for p in (*source.train, *source.held_out)}
    assert "it may use {question}, {choices}, {level}, {answer}" in refused(path, prompt="{question} {nope}")


# conversations --------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if think %}hm{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and its chat template."""
    return model_folder(tmp_path_factory.mktemp("model"), TEMPLATE)


def model_folder(folder: Path, template: str | None) -> Path:
    tokenizer = byte_level_bpe(["[user]", "[assistant]"], 270, template)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(model_config(BASE, len(tokenizer)).to_hf() | tokenizer.fields))
    return folder


def with_model(path: Path, model: Path, **keys: object) -> Source:
    values = config(path, **keys).model_dump()
    values["model"]["path"] = str(model)
    return open_source(validate(values))


def first(source: Source) -> str:
    (found,) = [p for p in (*source.train, *source.held_out) if p.id.endswith(":1")]
    assert source.tokenizer.decode(found.prompt_ids, special=True) == found.prompt
    return found.prompt


def test_messages_go_through_the_models_template(tmp_path: Path, model: Path) -> None:
    path = as_parquet(tmp_path, rows_of("verl"))
    assert first(with_model(path, model)) == "[user]0+5?[assistant]"
    assert first(with_model(path, model, system="Add.")) == "[system]Add.[user]0+5?[assistant]"
    assert first(with_model(path, model, template_args={"think": True})) == "[user]0+5?hm[assistant]"
    assert first(with_model(path, model, prompt="{question} ({ability})")) == "[user]0+5? (math)[assistant]"
    assert first(with_model(path, model, chat_template="plain")) == "user:\n0+5?\nassistant:\n"
    texts = as_lines(tmp_path, rows_of("numbers"))
    assert first(with_model(texts, model)) == "0+5?"
    assert first(with_model(texts, model, chat=True, prompt="Q: {question}")) == "[user]Q: 0+5?[assistant]"
    assert first(with_model(texts, model, system="Add.")) == "[system]Add.[user]0+5?[assistant]"


def test_a_system_prompt_replaces_that_of_the_data(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": [{"role": "system", "content": "Old."}, *user(f"{i}?")], "answer": i} for i in range(40)]
    path = write(tmp_path / "data.jsonl", rows)
    assert first(with_model(path, model)) == "[system]Old.[user]0?[assistant]"
    assert first(with_model(path, model, system="New.")) == "[system]New.[user]0?[assistant]"


@pytest.mark.parametrize("kind", [as_lines, as_parquet])
@pytest.mark.parametrize("text", [True, False])
def test_tools_are_passed_on(tmp_path: Path, model: Path, kind: Callable, text: bool) -> None:
    tools = json.dumps([TOOL]) if text else [TOOL | {"strict": None}]
    rows = [{"prompt": user(f"{i}?"), "label": i, "tools": tools} for i in range(40)]
    prompt = first(with_model(kind(tmp_path, rows), model))
    assert prompt.startswith("[user]0?[") and json.loads(prompt[8:].removesuffix("[assistant]")) == [TOOL]
    line = refused(as_lines(tmp_path, rows), chat_template="plain")
    assert "data.jsonl:1: the problem has tools, and the chat template does not write any" in line


def test_nulls_of_parquet_are_no_keys(tmp_path: Path, model: Path) -> None:
    """Each message there has the keys of all others."""
    template = "{% for m in messages %}{{ m.keys() | sort | join('+') }} {% endfor %}"
    rows = [
        {"prompt": [{"role": "tool", "content": "x", "name": "add"}, *user(f"{i}?")], "answer": i} for i in range(40)
    ]
    (tmp_path / "keys.jinja").write_text(template + "{{ messages[-1].content }}")
    for kind in (as_lines, as_parquet):
        prompt = first(load(kind(tmp_path, rows), chat_template=str(tmp_path / "keys.jinja")))
        assert prompt == "content+name+role content+role 0?"


CHATS = {
    "no template": ({}, "the model has no chat template: set data.chat_template=plain"),
    "no file": ({"chat_template": "/none.jinja"}, "data.chat_template=/none.jinja: cannot be read: No such file"),
    "today": ({"chat_template": "{{ strftime_now('%d') }}"}, "writes today's date"),
    "raises": ({"chat_template": "{{ raise_exception('roles must alternate') }}"}, "data.jsonl:1: the chat template"),
    "no Jinja": ({"chat_template": "{% for %}"}, "data.jsonl:1: the chat template cannot write these messages"),
}


@pytest.mark.parametrize("case", CHATS)
def test_chats_that_cannot_be_written(tmp_path: Path, case: str) -> None:
    keys, part = CHATS[case]
    if "{" in keys.get("chat_template", ""):
        (tmp_path / "t.jinja").write_text(keys["chat_template"])
        keys = {"chat_template": str(tmp_path / "t.jinja")}
    assert part in refused(as_lines(tmp_path, rows_of("verl")), **keys)


def test_keys_of_a_conversation_that_nothing_reads(tmp_path: Path) -> None:
    path = as_lines(tmp_path, rows_of("numbers"))
    assert "data.chat_template is set, and the questions are texts: set data.chat" in refused(
        path, chat_template="plain"
    )
    assert "data.template_args is set" in refused(path, template_args={"think": True})
    assert "data.tools=tols: no row has such a field" in refused(path, tools="tols", chat_template="plain")


def test_a_text_may_have_tools_of_another_kind(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": i, "tools": "hammer"} for i in range(40)]
    path = write(tmp_path / "data.jsonl", rows)
    assert len(load(path).train) > 20
    assert "data.jsonl:1: field 'tools': not JSON" in refused(path, chat=True, chat_template="plain")


def test_an_answer_beside_what_the_assistant_said(tmp_path: Path) -> None:
    """The one judges, the other is taught."""
    rows = [{"messages": [*user(f"{i}+5?"), *said(f"It is {i + 5}.")], "answer": i + 5} for i in range(40)]
    source = load(write(tmp_path / "data.jsonl", rows), chat_template="plain")
    problem = next(p for p in (*source.train, *source.held_out) if p.id == "data.jsonl:1")
    assert (problem.prompt, problem.answer, problem.solution) == ("user:\n0+5?\nassistant:\n", "5", "It is 5.")


def test_messages_that_are_none(tmp_path: Path) -> None:
    for wrong in ([{"role": "user"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": 3}]):
        path = write(tmp_path / "data.jsonl", [{"prompt": wrong, "answer": 1}])
        assert "data.jsonl:1: message 1 of 'prompt' needs a role and a content" in refused(path, chat_template="plain")
    for wrong in ([], ["x"], [{"content": "x"}], {"role": "user", "content": "x"}, 3, None):
        path = write(tmp_path / "data.jsonl", [{"prompt": wrong, "answer": 1}])
        assert "data.jsonl:1: no text field 'prompt'" in refused(path, chat_template="plain")


def test_the_trained_model_has_the_template(tmp_path: Path) -> None:
    source = load(as_lines(tmp_path, rows_of("verl")), chat_template="plain")
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in source.tokenizer.files.items():
        (folder / name).write_bytes(content)
    shape = model_config(BASE, len(source.tokenizer)).to_hf()
    (folder / "config.json").write_text(json.dumps(shape | source.tokenizer.fields))
    again = with_model(tmp_path / "data.jsonl", folder)
    assert [p.prompt_ids for p in again.train] == [p.prompt_ids for p in source.train]


# splits ---------------------------------------------------------------------------------------------------------------


def test_what_is_held_out(tmp_path: Path) -> None:
    rows = rows_of("numbers")
    path, other = as_lines(tmp_path, rows), write(tmp_path / "other.jsonl", rows_of("numbers", 40, 50))
    source = load(path)
    assert len(source.train) + len(source.held_out) == 40 and len(source.held_out) > 1
    source = load(path, held_out=str(other))
    assert (len(source.train), [p.id for p in source.held_out][:2]) == (40, ["other.jsonl:1", "other.jsonl:2"])
    (tmp_path / "more").mkdir()
    again = write(tmp_path / "more" / "data.jsonl", rows_of("numbers", 40, 50))  # of the same name
    source = load(path, held_out=str(again))
    assert [p.id for p in source.held_out][:2] == ["held out data.jsonl:1", "held out data.jsonl:2"]
    splits = as_splits(tmp_path, rows)
    assert (len(load(splits).train), len(load(splits).held_out)) == (30, 10)
    assert (len(load(splits, split="test", held_out="train").train)) == 10
    assert len(load(splits, held_out=str(other)).held_out) == 10
    folder = tmp_path / "files"
    folder.mkdir()
    for name, part in (("train", rows[:20]), ("dev", rows[20:])):
        write(folder / f"{name}.jsonl", part)
    assert len(load(folder, held_out="dev").held_out) == 20


def test_splits_that_are_not_there(tmp_path: Path) -> None:
    rows = rows_of("numbers")
    path, splits = as_lines(tmp_path, rows), as_splits(tmp_path, rows)
    assert "data.held_out=test: data.path is one file, which has no splits" in refused(path, held_out="test")
    assert "nope.jsonl does not exist" in refused(path, held_out=str(tmp_path / "nope.jsonl"))
    assert "cannot be read: File name too long" in refused(path, held_out="/" + "x" * 5000)
    assert "data.path is one file, which has no splits" in refused(path, held_out="x" * 5000)
    assert "data.split=dev: data.path is one file" in refused(path, split="dev")
    for place in (path, splits):
        assert f"data.subset=main: {place} has none" in refused(place, subset="main")
    assert "data.split=nope" in refused(splits, split="nope") and "it has test, train" in refused(splits, split="nope")
    assert f"data.held_out=nope: {splits} has no such split" in refused(splits, held_out="nope")
    assert "is trained on" in refused(splits, held_out="train") or "are trained on" in refused(splits, held_out="train")
    (tmp_path / "empty").mkdir()
    assert "empty holds no train.jsonl" in refused(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset_dict.json").write_text("{")
    assert "data.path=" in refused(tmp_path / "broken")


HUB = {"train": (0, 30), "validation": (30, 36), "extra": (36, 40)}


def test_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    line = refused("openai/gsm8k", subset="main")
    assert line.startswith("data.path=openai/gsm8k is no file or folder here, and the hub cannot be reached (")
    assert line.endswith("save_to_disk(DIR)), and set data.path=DIR")
    for path in ("./openai/gsm8k", "/openai/gsm8k", "a/b/c", "openai/"):
        assert refused(path) == f"data.path={path} does not exist"


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its splits and its fields, as the library returns them; and what it says where it does not."""
    monkeypatch.chdir(tmp_path)
    parts = {name: datasets.Dataset.from_list(rows_of("verl", *ends)) for name, ends in HUB.items()}
    asked = []

    def load_dataset(path: str, name: str | None) -> datasets.DatasetDict:
        asked.append((path, name))
        if name != "main":
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']")
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = load("toy/add", subset="main", chat_template="plain")
    assert asked == [("toy/add", "main")] and (len(source.train), len(source.held_out)) == (30, 6)
    assert [p.id for p in source.held_out][:2] == ["validation:0", "validation:1"]
    assert len(load("toy/add", subset="main", chat_template="plain", held_out="extra").held_out) == 4
    line = refused("toy/add", chat_template="plain")
    assert line.startswith("data.path=toy/add data.subset=None: Config name is missing. Please pick one among")

    def missing(path: str, name: str | None) -> None:
        raise datasets.exceptions.DatasetNotFoundError(
            f"Dataset '{path}' doesn't exist on the Hub or cannot be accessed."
        )

    monkeypatch.setattr(datasets, "load_dataset", missing)
    line = refused("toy/add")
    assert line.startswith(
        "data.path=toy/add is no file or folder here, and the hub does not give it: Dataset 'toy/add'"
    )


# what a run is --------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_with_the_same_rows_alone(tmp_path: Path) -> None:
    """A reward may read any field; where the rows lie, and in what kind of file, does not matter."""
    rows = rows_of("verl")
    asked = [config(kind(tmp_path, rows), chat_template="plain") for kind in (as_lines, as_json_lines, as_saved)]
    runs = [identity(c, open_source(c)) for c in asked]
    assert runs[0][ROWS] and not difference(runs[0], runs[1]) and not difference(runs[0], runs[2])
    rows[7]["extra_info"]["index"] = -1
    changed = config(as_lines(tmp_path, rows), chat_template="plain")
    assert difference(runs[0], identity(changed, open_source(changed))).startswith(ROWS)


def test_a_run_of_an_earlier_version_goes_on() -> None:
    """It had fewer keys, and called the kind otherwise."""
    (now,) = check(["data=gsm8k", "data.path=x"])
    values = now.model_dump(mode="json")
    earlier = ("kind", "path", "question", "answer", "marker", "prompt", "vocab_size", "max_prompt_tokens")
    values["data"] = {key: values["data"][key] for key in earlier} | {"kind": "jsonl"}
    assert validate(renewed(values)) == now
    mine = identity(now)
    theirs = {k: v for k, v in mine.items() if not k.startswith("data.") or k.removeprefix("data.") in earlier}
    assert difference(theirs | {"data.kind": "jsonl"}, mine) == ""
    assert difference(
        theirs | {"data.kind": "jsonl"}, identity(check(["data=gsm8k", "data.path=x", "data.chat=true"])[0])
    )
    assert difference(identity(check([])[0]), mine).startswith("data.kind=reasoning_gym there")


# python -m rl.data ----------------------------------------------------------------------------------------------------


def test_the_command_shows_what_a_run_would_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_parquet(tmp_path, rows_of("verl"))
    main(["data=dataset", "--rows", "1", f"data.path={path}", "data.chat_template=plain", "data.system=Add."])
    out = capsys.readouterr().out
    source = load(path, chat_template="plain", system="Add.", vocab_size=1024)
    lines = out.split("\n")
    assert lines[0] == FORMATS["verl"][1]
    assert f"train      {len(source.train)} problems" in lines and "judged by  math-verify" in lines
    for part, problems in (("train", source.train), ("held out", source.held_out)):
        shown = lines[lines.index(f"{part} 1 of {len(problems)}: {problems[0].id}") :]
        prompt = "\n".join(line[11:] for line in shown[1:7])
        assert prompt == problems[0].prompt and shown[1].startswith("  prompt   system:")
        assert f"  ids      {' '.join(map(str, problems[0].prompt_ids))}" in shown
        assert f"  answer   {problems[0].answer}" in shown
    assert "train 2 of" not in out


def test_the_command_shows_what_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data.problems=100"])
    out = capsys.readouterr().out
    assert "judged by  the verifier of chain_sum" in out and "train 2 of" in out and "train 3 of" not in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["data=dataset"], "data.path has no value: set data.path="),
        (["data=dataset", "data.path=/none"], "data.path=/none does not exist"),
        (["data.nope=1"], "unknown key 'data.nope'"),
        (["seed=0,1"], "2 runs: the data of one is shown"),
        (["--rows=-1"], "--rows=-1: must be 0 or more"),
        (["--rows=x"], "invalid int value: 'x'"),
        (["-m"], "unrecognized arguments: -m"),
    ],
)
def test_the_command_is_told_wrong(capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("samebit: error: ") and part in err
