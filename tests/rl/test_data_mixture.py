"""Several sources in one stream, and the order in which problems come first."""

import json
from pathlib import Path

import pytest

from rl.compose import check
from rl.config import RunConfig, validate
from rl.data import TRAIN, Source, open_source
from rl.data.__main__ import main
from rl.errors import UserError
from rl.identity import CONTENT, difference, identity

GYM = "gym:{data: arithmetic, problems: 200}"


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"{i} and 5?"}], "label": i + 5, "level": -i} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixture(path: Path, *overrides: str, more: str = "") -> RunConfig:
    mine = f"mine:{{path: {path}, chat_template: plain{more}}}"
    return check(["data=mixture", f"data.sources={{{mine}, {GYM}}}", "data.weights={mine: 3}", *overrides])[0]


def test_a_mixture_of_a_task_and_a_file(sums: Path) -> None:
    config = mixture(sums)
    source = open_source(config)
    alone = {
        "gym": open_source(check(["data.problems=200"])[0]),
        "mine": open_source(check(["data=dataset", f"data.path={sums}", "data.chat_template=plain"])[0]),
    }
    for name, own in alone.items():
        for mixed, problems in ((source.train, own.train), (source.held_out, own.held_out)):
            assert [p.prompt for p in mixed if p.id.startswith(f"{name}/")] == [p.prompt for p in problems]
    assert [share.weight for share in source.shares] == [1, 3]
    taken = source.stream(config.seed, TRAIN).take(400)
    assert sum(p.id.startswith("mine/") for p in taken) == 300
    for problem in (*source.train, *source.held_out):
        assert source.judge(problem, problem.answer) == 1.0 and source.judge(problem, "no") < 1.0
        assert source.tokenizer.decode(problem.prompt_ids, special=True) == problem.prompt
    few = [p.id.partition("/")[0] for p in source.held_out[:16]]
    assert set(few) == {"gym", "mine"}  # an evaluation takes the first ones
    again = open_source(validate(config.model_dump(mode="json")))
    assert [p.prompt_ids for p in again.train] == [p.prompt_ids for p in source.train]


def test_a_run_goes_on_with_the_same_mixture_alone(sums: Path, tmp_path: Path) -> None:
    def mine(config: RunConfig) -> dict:
        return identity(config, open_source(config))

    run = mine(mixture(sums))
    moved = tmp_path / "moved.jsonl"
    sums.rename(moved)
    told = difference(run, mine(mixture(moved)))
    assert told == "", told
    assert "data.weights.mine=3 there, data.weights.mine=2 here" in difference(
        run, mine(mixture(moved, "data.weights={mine: 2}"))
    )
    moved.write_text(moved.read_text().replace("7 and 5?", "7 + 5?"))
    assert difference(run, mine(mixture(moved))).startswith(CONTENT)


def first(source: Source, count: int) -> list[str]:
    return [p.prompt for p in source.stream(0, TRAIN).take(count)]


def test_a_curriculum(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    rows = [{"question": "x" * (i % 9 + 1) + str(i), "answer": 1, "meta": {"level": str(-i)}} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(*more: str) -> Source:
        return open_source(check(["data=dataset", f"data.path={path}", *more])[0])

    drawn, by_level = load(), load("data.curriculum=meta.level")
    size = len(drawn.train)
    assert first(by_level, size) == [p.prompt for p in reversed(drawn.train)] != first(drawn, size)
    assert first(by_level, 2 * size)[size:] == first(drawn, 2 * size)[size:]
    lengths = [
        len(p.prompt_ids)
        for p in load("data.curriculum=prompt_tokens", "data.vocab_size=258").stream(0, TRAIN).take(size)
    ]
    assert lengths == sorted(lengths) and len(set(lengths)) > 5
    for wrong in ("answers", "question"):
        with pytest.raises(UserError, match=rf"^data.jsonl:\d+: data.curriculum={wrong}: no number is there"):
            load(f"data.curriculum={wrong}")


def test_a_curriculum_in_a_mixture(sums: Path) -> None:
    source = open_source(mixture(sums, more=", curriculum: level"))
    taken = [p for p in source.stream(0, TRAIN).take(200) if p.id.startswith("mine/")]
    levels = [p.record["level"] for p in taken]
    assert levels == sorted(levels) and len(levels) == 150


def test_the_command_shows_each_source(sums: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = mixture(sums)
    source = open_source(config)
    said = f"data.sources={{mine:{{path: {sums}, chat_template: plain}}, {GYM}}}"
    main(["data=mixture", said, "data.weights={mine: 3}", "--rows=1"])
    out = capsys.readouterr().out
    for share, name, weight in zip(source.shares, ("gym", "mine"), (1, 3), strict=True):
        assert f"{name}: {share.problems} problems to train on, weight {weight}, " in out
        assert f"train 1 of {share.problems}: {name}/" in out
    assert "mine: slime's format: question from 'prompt', answer from 'label'" in out
