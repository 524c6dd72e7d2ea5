"""The evaluation judges by the run's own reward, and says so."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from rl.compose import check
from rl.data import Source, open_source
from rl.environments.single_turn import SingleTurn
from rl.evaluate import Evaluation, Evaluator
from rl.requests import requests_for
from rl.rewards.reward import Reward
from rollout.sampling import Completion, Request, SamplingParams
from tests.rl.rewards.opening import opened


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(check(["data.problems=300"])[0])


def answers(
    source: Source, texts: list[str], reward: Reward, capsys: pytest.CaptureFixture[str]
) -> tuple[Evaluation, str]:
    """What is found where the engines answer the held-out problems with `texts`."""
    ids = [source.tokenizer.encode(t, add_special_tokens=False) for t in texts]

    calls: list[str] = []

    def generate(requests: list[Request]) -> list[Completion]:
        calls.append("sample")
        assert [r.prompt_ids for r in requests] == [p.prompt_ids for p in source.held_out[: len(texts)]]
        return [Completion(r.id, ids[r.id], (0.0,) * len(ids[r.id]), "stop", 0, r.sampling) for r in requests]

    problems, sampling = source.held_out[: len(texts)], SamplingParams(9, 0.5)
    requests = requests_for(problems, 1, sampling, 0, "eval", 0)
    evaluator = Evaluator(problems, requests, SingleTurn(source.tokenizer, reward), reward.name)
    cards = SimpleNamespace(to_rollout=lambda: calls.append("wake"))
    found = evaluator(generate, cards, lambda: calls.append("compare"), Console())
    assert calls == ["wake", "compare", "sample"]
    return found, capsys.readouterr().out


def test_by_the_datas_verifier(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    right = [p.answer for p in source.held_out[:3]]
    found, line = answers(source, [*right, "99999"], opened(source), capsys)
    assert found.accuracy == 0.75 and found.metrics()["eval/accuracy"] == 0.75
    assert line.startswith("held-out accuracy 0.750 (3 of 4 earn 1, mean reward 0.7")
    assert "by the verifier of chain_sum; temperature 0.5)" in line


def test_by_the_users_reward(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    found, line = answers(source, ["", "1", "12", "123"], opened(source, "tests.rl.command:length"), capsys)
    assert found == Evaluation(0.75, 1.5) and found.metrics() == {"eval/accuracy": 0.75, "eval/reward": 1.5}
    assert "(3 of 4 earn 1, mean reward 1.500, by reward=tests.rl.command:length; temperature 0.5)" in line
