"""Several sets of an evaluation: what each holds, who judges it, and how a command line, a run and a log name it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rl.compose import check
from rl.config import RunConfig, validate
from rl.data import open_source
from rl.environments.choice import open_hosts, set_environment
from rl.environments.single_turn import SingleTurn
from rl.errors import UserError
from rl.evaluation import Evaluators, make_evaluator, make_set_evaluator, open_sets
from rl.evaluation.command import main as evaluate
from rl.identity import difference, identity
from rl.keys import renewed
from rl.prepare import prepare
from rl.run.screen import Screen
from rollout.replies import Replies
from rollout.sampling import Completion, Request
from tests.rl.rewards.opening import opened
from tests.weights.folders import write_folder

FEW = ("data.problems=300", "rollout.pages=64", "logger=none")


def rows(path: Path, *pairs: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return rows(tmp_path / "sums.jsonl", *((f"{a}+{a}-1=", str(2 * a - 1)) for a in range(1, 9)))


def config_with(*overrides: str) -> RunConfig:
    (config,) = check([*FEW, *overrides])
    return config


def test_a_set_is_whole_however_little_is_said_of_it(file: Path) -> None:
    """By a mapping and by dotted keys; and what a config.yaml says is read as the same again."""
    short = config_with(f"eval.sets={{sums: {{path: {file}, samples: 4}}}}")
    dotted = config_with(f"eval.sets.sums.path={file}", "eval.sets.sums.samples=4")
    assert short.eval == dotted.eval and short.eval.sets["sums"].samples == 4
    assert validate(yaml.safe_load(yaml.safe_dump(short.model_dump(mode="json")))) == short


@pytest.mark.parametrize("reward", ["null", "verifier", "exact", "[exact,{function: length, weight: 0}]"])
def test_a_reward_of_its_own_is_read_again_as_it_was(file: Path, reward: str) -> None:
    config = config_with("reward=length", f"eval.sets.sums.path={file}", f"eval.sets.sums.reward={reward}")
    again = validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again.eval.sets == config.eval.sets
    assert (config.eval.sets["sums"].reward is None) == (reward == "null")


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ("{a: {path: FILE, sampls: 4}}", "unknown key 'eval.sets.a.sampls'"),
        ("{a: {path: FILE, samples: 0}}", "eval.sets.a.samples=0: "),
        ("{a: {task: no_such_task}}", "eval.sets.a: data.task='no_such_task' is no reasoning-gym dataset"),
        ("{a: {path: /no/where.jsonl}}", "eval.sets.a: data.path=/no/where.jsonl does not exist"),
        ("{a: {path: FILE, reward: nothing}}", "eval.sets.a: reward='nothing'"),
        ("{a: {path: FILE, reward: 3}}", "eval.sets.a.reward=3: "),
        ("{a: {samples: 3}}", "eval.sets.a.path has no value"),
        ("{a: {data: mixture}}", "eval.sets.a.data: unknown data 'mixture'"),
        ("{a/b: {path: FILE}}", "eval.sets.a/b"),
        ("{a: {data: arithmetic, problems: 1}}", "eval.sets.a: no problem is left: of 1 problems none is held out"),
        ("FILE", "eval.sets='"),
        ("{a: {path: OTHER}}", "eval.sets.a: the prompt of problem 'other.jsonl:1' has characters that the tokenizer"),
    ],
)
def test_a_set_that_cannot_be(sets: str, said: str, file: Path, tmp_path: Path) -> None:
    other = rows(tmp_path / "other.jsonl", ("3*4=", "12"))
    with pytest.raises(UserError) as error:
        config = config_with(f"eval.sets={sets.replace('FILE', str(file)).replace('OTHER', str(other))}")
        source = open_source(config)
        open_sets(config, source.tokenizer, source.train)
    assert str(error.value).startswith(said) and "\n" not in str(error.value), error.value


def test_a_run_prepares_its_sets_and_an_old_one_goes_on(file: Path, tmp_path: Path) -> None:
    """Sets decide no bit: the identity of a run is that without them, and a config of before has none."""
    plain = config_with("steps=1", f"out_dir={tmp_path}")
    config = config_with(
        "steps=1", f"out_dir={tmp_path}", f"eval.sets={{sums: {{path: {file}}}, gym: {{data: arithmetic}}}}"
    )
    ready = prepare(config, Screen(quiet=True))
    assert list(ready.sets) == ["sums", "gym"] and len(ready.sets["sums"].problems) == 8  # all of a file
    assert {p.id for p in ready.sets["gym"].problems}.isdisjoint(p.id for p in ready.source.train)
    assert ready.sets["sums"].reward.name == "math-verify" and "chain_sum" in ready.sets["gym"].reward.name
    assert not difference(identity(plain, ready.source), ready.identity)
    assert not difference(ready.identity, identity(plain, ready.source))
    old = plain.model_dump(mode="json")
    del old["eval"]["sets"]
    assert validate(renewed(old)) == plain


def test_what_is_trained_on_too_is_warned_of(file: Path) -> None:
    config = config_with(f"eval.sets.sums.path={file}")
    source = open_source(config)
    twice = SimpleNamespace(prompt="1+1-1=")
    (found,) = open_sets(config, source.tokenizer, [twice]).values()  # type: ignore[list-item]
    assert found.warnings == ("1 of 8 problems are trained on too",)


def test_each_is_evaluated_by_its_own_reward_and_named(
    file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = config_with(
        "eval.problems=3", "eval.keep_samples=true", f"out_dir={tmp_path}",
        f"eval.sets={{sums: {{path: {file}, samples: 2}}, long: {{path: {file}, reward: tests.rl.command:length}}}}",
    )  # fmt: skip
    source = open_source(config)
    sets, reward = open_sets(config, source.tokenizer, ()), opened(source)
    answer = source.tokenizer.completion("1")
    seen: list[list[Request]] = []

    def generate(requests: list[Request]) -> list[Completion]:
        seen.append(list(requests))
        return [Completion(r.id, answer, (0.0,) * len(answer), "stop", 0, r.sampling) for r in requests]

    one = {name: SingleTurn(source.tokenizer, s.reward) for name, s in sets.items()}
    ends = source.tokenizer.ends
    evaluators = Evaluators(
        make_evaluator(config, source, SingleTurn(source.tokenizer, reward), reward.name),
        {name: make_set_evaluator(config, name, s, ends, one[name]) for name, s in sets.items()},
    )
    how: dict[str, Any] = {
        "cards": SimpleNamespace(to_rollout=lambda: None),
        "compare": lambda: None,
        "console": Screen(),
    }
    found = evaluators(5, generate=generate, **how).metrics()
    assert [len(requests) for requests in seen] == [3, 6, 3]
    assert found["eval/sums/accuracy"] == pytest.approx(1 / 3)  # 1+1-1 is one of the three
    assert found["eval/sums/pass@2"] == pytest.approx(1 / 3) and "eval/pass@2" not in found
    assert found["eval/long/reward"] == 1.0 and "eval/accuracy" in found
    said = capsys.readouterr().out
    assert "sums accuracy 0.333" in said and "long accuracy 1.000" in said and "by math-verify" in said
    kept = sorted(str(p.relative_to(tmp_path)) for p in (tmp_path / "evaluations").rglob("*.jsonl"))
    assert kept == ["evaluations/00000005.jsonl", "evaluations/long/00000005.jsonl", "evaluations/sums/00000005.jsonl"]


@pytest.mark.parametrize("own", [False, True])
def test_sets_are_played_in_the_runs_environment(own: bool, file: Path) -> None:
    """With its tools; judged by the set's reward, and by the environment's own beside it, or alone where nobody names one."""
    game = "environment.factory=tests.rl.environments.games:Counted"
    config = config_with(
        *("+recipe=calculator", "eval.problems=3", *([game] if own else [])),
        f"eval.sets={{sums: {{path: {file}}}, long: {{path: {file}, reward: tests.rl.command:length, samples: 2}}}}",
    )
    hosts = open_hosts(config, {})
    assert hosts
    source = open_source(config, None, hosts.about)
    sets, tokenizer = open_sets(config, source.tokenizer, ()), source.tokenizer
    prompts: dict[int, list[str]] = {}

    def generate(requests: list[Request], replies: Replies) -> list[Completion]:
        assert not requests
        prompts.clear()
        while new := replies.requests(idle=True):
            for request in new:
                text = tokenizer.decode(request.prompt_ids)
                prompts.setdefault(request.id, []).append(text)
                said = tokenizer.completion("c(1+1)" if "c(" not in text else "2")
                replies.take([Completion(request.id, said, (0.0,) * len(said), "stop", 0, request.sampling)])
        return []

    how: dict[str, Any] = {
        "cards": SimpleNamespace(to_rollout=lambda: None),
        "compare": lambda: None,
        "console": Screen(),
    }
    for name in ("sums", "long"):
        environment = set_environment(config, name, sets[name].problems, sets[name].reward, tokenizer, hosts)
        found = make_set_evaluator(config, name, sets[name], tokenizer.ends, environment)(5, generate=generate, **how)
        assert len(prompts) == 3 * (config.eval.sets[name].samples or 1)
        assert all(len(turns) == 2 and turns[1] == f"{turns[0]}c(1+1)\n2\n" for turns in prompts.values())
        metrics = found.metrics(f"eval/{name}")
        expected = {"sums": 1.0 if own else 0.0, "long": 2.0 if own else 1.0}
        assert metrics[f"eval/{name}/reward"] == expected[name], name
        of_set = {"sums": "" if own else "math-verify", "long": "reward=tests.rl.command:length"}[name]
        names = of_set, "Counted.get_reward" if own else ""
        assert environment.judged_by == " + ".join(filter(None, names))
    hosts.close()


def test_the_command_takes_several(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone where a model directory and no data is named; beside a run's own; and a set's figures are those that it has as the
    data of an evaluation."""
    folder = write_folder(tmp_path / "run" / "model")
    out, samples = tmp_path / "found.json", tmp_path / "samples.jsonl"
    sums = f"{{path: {file}, samples: 2, reward: tests.rl.command:length}}"
    sets = f"eval.sets={{sums: {sums}, few: {{data: arithmetic, problems: 200}}}}"
    brief = ("eval.problems=4", "rollout.pages=64", "rollout.tp=1")
    evaluate([str(folder), "--json", str(out), "--samples", str(samples), sets, *brief])
    found = json.loads(out.read_text())
    assert found["sets"].keys() == {"sums", "few"} and "accuracy" not in found and found["eval/sums/pass@2"] >= 0
    kept = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["set"] for row in kept] == ["sums"] * 8 + ["few"] * 4

    assert "held-out" not in capsys.readouterr().out
    (config,) = check([*FEW, f"model.path={folder}", "warmup.steps=0"])
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    evaluate(
        [
            str(tmp_path / "run"),
            "--json",
            str(out),
            f"eval.sets={{sums: {{path: {file}, reward: tests.rl.command:length}}}}",
            *brief,
        ]
    )
    beside = json.loads(out.read_text())
    assert beside["problems"] == 4 and beside["sets"].keys() == {"sums"} and "eval/accuracy" in beside

    halves = tmp_path / "halves"
    halves.mkdir()
    rows(halves / "train.jsonl", ("9+9+9=", "27"))
    (halves / "test.jsonl").write_text(file.read_text())
    evaluate(
        [
            str(folder),
            "--json",
            str(out),
            "data=dataset",
            f"data.path={halves}",
            "reward=tests.rl.command:length",
            *brief,
        ]
    )
    alone = json.loads(out.read_text())
    assert alone["reward"] == beside["sets"]["sums"]["reward"] and alone["tokens"] == beside["sets"]["sums"]["tokens"]
