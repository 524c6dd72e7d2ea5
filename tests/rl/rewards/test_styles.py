"""Rewards as other frameworks write them, unmodified."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from rl.compose import check
from rl.data import Problem, Source
from rl.data.tokenizer import of_characters
from rl.errors import UserError
from rl.rewards.reward import Reward
from tests.rl.command import ROOT
from tests.rl.rewards.opening import earned, opened, verdicts

ROW = {
    "data_source": "toy/add",
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "7"},
    "extra_info": {"split": "train", "index": 3},
    "level": 2,
    "label": "seven",
}
CHAT = [{"role": "user", "content": "2+5?"}]
TEXT = Problem("p0", "2+5=", (1,), "7", "it is 7", ROW)
SPOKEN = Problem("p1", "<user>2+5?", (1,), "7", "it is 7", ROW | {"prompt": CHAT}, CHAT)

STYLES = '''
import asyncio, json, functools
import numpy as np


def ours(problem, text):
    return len(text) + problem.record["level"]


async def ours_async(problem, text):
    await asyncio.sleep(0)
    return ours(problem, text)


def trl(completions, level, **kwargs):
    assert kwargs["trainer_state"] is None and "prompt" not in kwargs
    return [float(len(c) + l) for c, l in zip(completions, level, strict=True)]


def trl_all(**kwargs):
    return [json.dumps(kwargs, default=repr) and float(len(kwargs["completions"]))] * len(kwargs["prompts"])


def trl_seen(prompts, completions, completion_ids, level):
    """Takes no **kwargs: the other columns are not for it."""
    return [float(f"{len(p)}{len(c)}{len(i)}{l}") for p, c, i, l in zip(prompts, completions, completion_ids, level)]


def trl_chat(prompts, completions, **kwargs):
    assert prompts[0] == [{"role": "user", "content": "2+5?"}] and completions[0][0]["role"] == "assistant"
    return [float(len(c[0]["content"])) for c in completions]


async def trl_async(completions, **kwargs):
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def trl_none(completions, **kwargs):
    return [None if "?" in c else 1.0 for c in completions]


def trl_logs(completions, log_metric, log_extra, **kwargs):
    log_metric("mean_length", np.float32(sum(map(len, completions)) / len(completions)))
    log_extra("first", [c[:1] for c in completions])
    return np.array([1.0] * len(completions))


def trl_few(completions, **kwargs):
    return [1.0]


def verl(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "toy/add" and extra_info == {"split": "train", "index": 3}
    return float(solution_str == ground_truth)


def verl_dict(data_source, solution_str, ground_truth, extra_info, bonus=0.0):
    return {"score": float(solution_str == ground_truth) + bonus, "acc": solution_str == ground_truth, "pred": solution_str}


def verl_short(solution_str, ground_truth, method="strict"):
    return float(solution_str == ground_truth) + (method == "flexible")


def openrlhf(queries, prompts, labels, **kwargs):
    return {"rewards": [float(q == p + "7" and l == "seven") for q, p, l in zip(queries, prompts, labels)],
            "scores": [0.0] * len(queries), "extra_logs": {"length": [float(len(q)) for q in queries]}}


class Above:
    def __init__(self, least):
        self.least = least

    def __call__(self, problem, text):
        return float(len(text) >= self.least)


class AboveLater(Above):
    async def __call__(self, problem, text):
        return float(len(text) >= self.least)


partly = functools.partial(verl_dict, bonus=2.0)
asynchronous = lambda problem, text: ours_async(problem, text)


def no_column(completions, solution, **kwargs):
    return [1.0] * len(completions)
'''


@pytest.fixture(scope="module")
def source() -> Source:
    return Source([TEXT], [SPOKEN], lambda p, t: float(t == p.answer), of_characters(["0123456789+="]))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mine") / "styles.py"
    path.write_text(STYLES)
    return path


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("ours", [3, 4]),
        ("ours_async", [3, 4]),
        ("asynchronous", [3, 4]),
        ("trl", [3, 4]),
        ("trl_all", [2, 2]),
        ("trl_seen", [4112, 4222]),
        ("trl_async", [1, 2]),
        ("trl_none", [1, None]),
        ("trl_logs", [1, 1]),
        ("verl", [1, 0]),
        ("verl_dict", [1, 0]),
        ("verl_short", [1, 0]),
        ("openrlhf", [1, 0]),
        ("partly", [3, 2]),
    ],
)
def test_every_style(source: Source, file: Path, function: str, expected: list[float | None]) -> None:
    assert earned(opened(source, f"{file}:{function}"), TEXT, "7", "8?") == expected


def test_arguments(source: Source, file: Path) -> None:
    def one(function: str, **args: Any) -> Reward:
        return opened(source, {"function": f"{file}:{function}", "args": args})

    assert earned(one("Above", least=2), TEXT, "1", "12") == [0, 1]
    assert earned(one("AboveLater", least=2), TEXT, "1", "12") == [0, 1]
    assert earned(one("verl_dict", bonus=0.5), TEXT, "7", "12") == [1.5, 0.5]
    assert earned(one("verl_short", method="flexible"), TEXT, "7") == [2]
    for function, args in (("Above", {}), ("ours", {"least": 2})):
        with pytest.raises(UserError, match=r"reward='.*styles.py:\w+' \(module:function\)"):
            one(function, **args)
    for function, args in (("verl", {"least": 2}), ("trl", {"completions": 2}), ("no_column", {})):
        with pytest.raises(UserError, match=f"the reward {function} raised TypeError"):
            earned(one(function, **args), TEXT, "1")


def test_conversations(source: Source, file: Path) -> None:
    """Where the prompt was a list of messages, prompts and completions are such lists, as TRL has them."""
    assert earned(opened(source, f"{file}:trl_chat"), SPOKEN, "abc") == [3]
    with pytest.raises(UserError, match="AssertionError"):
        earned(opened(source, f"{file}:trl_chat"), TEXT, "abc")


def test_what_a_reward_says_beside_its_value(source: Source, file: Path) -> None:
    def notes(function: str) -> list[dict[str, Any]]:
        return [dict(v.notes) for v in verdicts(opened(source, f"{file}:{function}"), [TEXT] * 2, ["7", "ab"])]

    assert notes("trl_logs") == [{"trl_logs/mean_length": 1.5, "trl_logs/first": x} for x in ("7", "a")]
    assert notes("verl_dict")[1] == {"verl_dict/acc": False, "verl_dict/pred": "ab"}
    assert notes("openrlhf") == [{"openrlhf/length": 5.0}, {"openrlhf/length": 6.0}]
    assert json.dumps(notes("verl_dict"))


def test_a_batched_reward_sees_the_samples_of_one_problem(source: Source, file: Path) -> None:
    """However many processes there are, and whatever else is judged."""
    reward = opened(source, f"{file}:trl_all")
    assert [v.reward for v in verdicts(reward, [TEXT, SPOKEN, SPOKEN], ["a", "b", "c"])] == [1, 2, 2]
    with pytest.raises(
        UserError, match="the reward trl_few raised ValueError: 1 rewards for 2 completions; problem 'p1'"
    ):
        verdicts(opened(source, f"{file}:trl_few"), [TEXT, SPOKEN, SPOKEN], ["a", "b", "c"])


def test_the_examples_of_the_docs(source: Source, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "rewards.md").read_text()
    (tmp_path / "mine.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    row = ROW | {"answer": "7", "label": "7"}
    problem = Problem("p", "2+5=", (1,), "7", "7", row)
    for function in ("ours", "trl", "verl", "openrlhf"):
        assert earned(opened(source, f"{tmp_path}/mine.py:{function}"), problem, "7", "8") == [1, 0]
    with pytest.raises(UserError, match="the reward asked raised NameError: name 'my_client'"):
        earned(opened(source, f"{tmp_path}/mine.py:asked"), problem, "7")
    at_least = {"function": f"{tmp_path}/mine.py:AtLeast", "weight": 0.2, "args": {"words": 2}}
    assert earned(opened(source, ["verifier", at_least]), problem, "7", "7 8") == [1.0, 0.2]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("exact", [1, 0, 1, 0]),
        ({"function": "exact", "args": {"marker": "#"}}, [1, 0, 1, 1]),
        ("answer", [1, 0, 1, 1]),
        ({"function": "answer", "args": {"marker": "#"}}, [1, 0, 1, 1]),
        ({"function": "format", "args": {"pattern": ".*7"}}, [1, 0, 0, 1]),
        ({"function": "length", "args": {"target": 1, "limit": 3}}, [0, -1, -0.5, -1]),
    ],
)
def test_built_in(source: Source, reward: Any, expected: list[float]) -> None:
    assert earned(opened(source, reward), TEXT, "7", "700", "7\n", "8 # 7") == expected


def test_the_form_of_a_thought(source: Source) -> None:
    good = "<think>\na < b\n</think>\n<answer>7</answer>"
    texts = (good, f" {good}\n", f"so {good}", good.replace("</think>", ""), good + good, "")
    assert earned(opened(source, "format"), TEXT, *texts) == [1, 1, 0, 0, 0, 0]


def test_bad_arguments_of_what_is_built_in(source: Source) -> None:
    for name, args in (("length", {"target": 3, "limit": 3}), ("format", {"pattern": "("}), ("code", {})):
        with pytest.raises(UserError, match=f"the reward {name} raised"):
            earned(opened(source, {"function": name, "args": args}), TEXT, "7")
    with pytest.raises(
        UserError, match=r"reward='formt' .*no function after 'formt'; verifier, answer, .* are built in"
    ):
        opened(source, "formt")


def test_the_commands_of_the_docs() -> None:
    lines = (ROOT / "docs" / "rewards.md").read_text().splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("python -m rl.train")]
    found = {r.function for command in commands for r in check(command[3:])[0].reward}
    assert {"answer", "format", "code", "http", "judge"} <= found and len(commands) >= 5
