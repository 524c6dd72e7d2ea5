"""The evaluation judges by the run's own reward, and says so; its measures are what their papers say."""

import itertools
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rl.compose import check
from rl.data import Problem, Source, open_source
from rl.environments.single_turn import SingleTurn
from rl.evaluation import Evaluation, Evaluator, measure
from rl.evaluation.command import main as evaluate
from rl.evaluation.measures import interval, majority, pass_at
from rl.requests import requests_for
from rl.rewards.answer import stated
from rl.rewards.reward import Reward
from rl.samples import Group, Sample
from rollout.sampling import Completion, Request, SamplingParams
from tests.rl.rewards.opening import opened
from tests.weights.folders import write_folder

FEW = ("data.problems=300", "rollout.pages=64")


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
    found = evaluator(0, generate, cards, lambda: calls.append("compare"), Console())
    assert calls == ["wake", "compare", "sample"]
    return found, capsys.readouterr().out


def test_by_the_datas_verifier(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    right = [p.answer for p in source.held_out[:3]]
    found, line = answers(source, [*right, "99999"], opened(source), capsys)
    assert found.accuracy == 0.75 and found.metrics()["eval/accuracy"] == 0.75
    assert line.startswith("held-out accuracy 0.750 (95%: 0.256 to 0.963; 3 of 4 earn 1, mean reward 0.7")
    assert "by the verifier of chain_sum; temperature 0.5)" in line


def test_by_the_users_reward(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    found, line = answers(source, ["", "1", "12", "123"], opened(source, "tests.rl.command:length"), capsys)
    assert (found.accuracy, found.reward, found.tokens) == (0.75, 1.5, 1.5) and not found.pass_at
    assert found.metrics().keys() == {
        "eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/reward", "eval/response_length_mean",
        "eval/truncated_frac",
    }  # fmt: skip
    assert "; 3 of 4 earn 1, mean reward 1.500, 1.5 tokens, by reward=tests.rl.command:length; temperature 0.5)" in line


def group(rewards: Sequence[float | None], texts: Sequence[str] | None = None) -> Group:
    """A problem whose samples earn `rewards`, with completions of one token more each."""
    samples = []
    for i, (reward, text) in enumerate(zip(rewards, texts or ["x"] * len(rewards), strict=True)):
        done = Completion(0, (1,) * (i + 1), (0.0,) * (i + 1), "length" if i == 0 else "stop", 0, SamplingParams(9))
        samples.append(Sample(((2, 3), done), text, reward))  # type: ignore[arg-type]
    return Group(Problem("p", "1+1=", (2, 3), "2", "2", None), tuple(samples))


@given(n=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(n: int, data: st.DataObject) -> None:
    right, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at(n, right, k) == Fraction(sum(map(any, subsets)), len(subsets))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=7))
def test_the_majority_is_what_a_lot_among_the_most_frequent_gives(said: list[tuple[str, bool]]) -> None:
    texts = [text for text, _ in said]
    most = max(map(texts.count, texts))
    each = [sum(ok for t, ok in said if t == text) / most for text in sorted({*texts}) if texts.count(text) == most]
    found = majority(group([float(ok) for _, ok in said], texts).samples, str.strip)
    assert float(found) == pytest.approx(sum(each) / len(each))


def test_the_measures_of_several_samples() -> None:
    groups = [group([1, 0, 2, 0], [" 2", "2", "3", "4"]), group([0, 0, 0, 0]), group([1, None, 1, 1])]
    found = measure(groups)
    assert found.accuracy == pytest.approx((0.5 + 0 + 1) / 3) and found.reward == pytest.approx((0.75 + 0 + 1) / 3)
    assert found.pass_at == {
        2: pytest.approx((5 / 6 + 0 + 1) / 3),
        4: pytest.approx((1 + 0) / 2),
    }  # 4 of the two that have 4
    assert found.majority == pytest.approx((0.5 + 0 + 1) / 3)
    assert (found.problems, found.samples, found.right, found.left_out) == (3, 11, 5, 1)
    assert found.tokens == 2.5 and found.truncated == 0.25
    assert found.metrics()["eval/pass@4"] == found.pass_at[4] and found.metrics()["eval/maj@4"] == found.majority
    assert "5 of 11 samples of 3 problems earn 1, pass@2 0.611, pass@4 0.500, maj@4 0.500" in found.told()
    empty = measure([group([None, None])])
    assert (empty.accuracy, empty.low, empty.high, empty.left_out) == (0, 0, 1, 2)


@given(n=st.integers(2, 300), data=st.data())
def test_the_interval_is_wilsons(n: int, data: st.DataObject) -> None:
    """Against its other form: the roots of (p - q)^2 = z^2 q (1 - q) / trials."""
    right = data.draw(st.integers(0, n))
    low, high = interval([Fraction(1)] * right + [Fraction(0)] * (n - right))
    p, trials = right / n, n - 1 if 0 < right < n else n
    assert 0 <= low <= p <= high <= 1
    for q in {low, high} - {0.0, 1.0}:
        assert (p - q) ** 2 == pytest.approx(1.959963984540054**2 * q * (1 - q) / trials, abs=1e-12)


def test_samples_of_one_problem_do_not_count_as_independent() -> None:
    """Four problems that are right always or never say as much with a hundred samples each as with one."""
    once, often = (interval([*[Fraction(k, k)] * 2, *[Fraction(0)] * 2]) for k in (1, 100))
    assert once == often
    mixed = interval([Fraction(1, 2)] * 3 + [Fraction(3, 4)])
    assert mixed[1] - mixed[0] < often[1] - often[0]


@pytest.mark.parametrize(
    ("text", "marker", "says"),
    [
        ("so #### 1,234 ", "####", "1,234"),
        (r"thus \boxed{ \text{B} } it is", None, "B"),
        (r"#### $\boxed{7}$.", "####", "7"),
        ("no marker", "####", "no marker"),
    ],
)
def test_what_a_text_states(text: str, marker: str | None, says: str) -> None:
    assert stated(text, marker) == says


def test_a_model_is_evaluated_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a model directory and as the folder of a run, by one rank and by two: the same figures and samples."""
    run = tmp_path / "run"
    folder = write_folder(run / "model")
    (config,) = check([*FEW, f"model.path={folder}", "eval.samples=4", "eval.problems=6", "warmup.steps=0"])
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    found, kept = [], []
    for what, tp in ((folder, 1), (run, 1), (run, 2)):
        asked = [*FEW, "eval.samples=4", "eval.problems=6"] if what == folder else []
        out, samples = tmp_path / "found.json", tmp_path / "samples.jsonl"
        evaluate([str(what), "--json", str(out), "--samples", str(samples), *asked, f"rollout.tp={tp}"])
        found.append(json.loads(out.read_text()))
        kept.append(samples.read_text())
    assert found[0] == found[1] == found[2] and kept[0] == kept[1] == kept[2]
    rows = [json.loads(line) for line in kept[0].splitlines()]
    assert (
        len(rows) == 24
        and [r["sample"] for r in rows[:5]] == [0, 1, 2, 3, 0]
        and {r["end"] for r in rows} <= {"stop", "length"}
    )
    assert found[0]["samples"] == 24 and found[0]["eval/pass@4"] == found[0]["pass_at"]["4"]
    assert found[0]["accuracy"] == sum(r["reward"] >= 1 for r in rows) / 24
    assert "model: 6 of " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere"),
        (["MODEL", "eval.sample=3"], "unknown key 'eval.sample' (did you mean eval.samples?)"),
        (["MODEL", "eval.samples=0"], "eval.samples=0: "),
        (["RUN", "eval.samples=0"], "eval.samples=0: "),
        (["RUN", "eval.smaples=3"], "unknown key 'eval.smaples' (did you mean eval.samples?)"),
        (["RUN", "eval"], "'eval' is no key=value"),
        (["UNFINISHED"], "is a run without a model"),
        (["MODEL", "rollout.pages=1", "rollout.page_size=1"], "tokens"),
    ],
)
def test_an_evaluation_that_cannot_be(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "run" / "model")
    (config,) = check([*FEW, f"model.path={folder}"])
    for name in ("run", "unfinished"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    paths = {"MODEL": str(folder), "RUN": str(tmp_path / "run"), "UNFINISHED": str(tmp_path / "unfinished")}
    data = FEW if arguments[0] == "MODEL" else ()
    with pytest.raises(SystemExit) as end:
        evaluate([paths.get(a, a) for a in arguments[:1]] + [*data, *arguments[1:]])
    err = capsys.readouterr().err
    assert end.value.code == 2 and said in err and len(err.splitlines()) == 1, err
